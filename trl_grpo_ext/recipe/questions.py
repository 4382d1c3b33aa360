"""Questions of reasoning-gym as datasets, with solved ones before each."""

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def draw_questions(
    tasks: Sequence[str], num_levels: int, counts: Mapping[str, int], num_examples: int = 0, seed: int = 0
) -> dict[str, Dataset]:
    """
    Distinct questions, the same for the same seed.

    Args:
        tasks (`Sequence[str]`):
            Names of reasoning-gym's tasks that have levels.
        num_levels (`int`):
            Levels of each task, from the easiest.
        counts (`Mapping[str, int]`):
            Most questions of each task and level in each split. Easy levels of some tasks have fewer.
        num_examples (`int`, *optional*, defaults to `0`):
            Solved questions of the task's easiest level that stand before each question, and are in no split.
        seed (`int`, *optional*, defaults to `0`):
            Of the questions.

    Returns:
        `dict[str, Dataset]`: columns `prompt`, `task`, `difficulty` (the level), `reference` and `entry`, the JSON that
        the verifier needs.
    """
    from reasoning_gym.factory import create_curriculum, create_dataset

    splits: dict[str, list[dict[str, Any]]] = {split: [] for split in counts}
    for task in tasks:
        known: set[str] = set()
        examples: list[dict[str, str]] = []
        for level in range(num_levels):
            knobs = create_curriculum(task)
            knobs.set_global_level(level)
            size = 4 * (sum(counts.values()) + num_examples)  # since some come twice
            settings = knobs.generate_configuration({"seed": seed + level, "size": size})
            entries = (entry for entry in create_dataset(task, **vars(settings)) if entry["question"] not in known)
            for entry in itertools.islice(entries, num_examples if level == 0 else 0):
                known.add(entry["question"])
                examples += solved(entry)
            for split, count in counts.items():
                for entry in itertools.islice(entries, count):
                    known.add(entry["question"])
                    prompt = [*examples, {"role": "user", "content": entry["question"]}]
                    row = {"prompt": prompt, "task": task, "difficulty": level, "reference": entry["answer"]}
                    splits[split].append({**row, "entry": json.dumps(entry, default=str)})
    return {split: Dataset.from_list(rows) for split, rows in splits.items()}


def final_answer(text: str, reference: str) -> str:
    """
    The part of a completion that a verifier of reasoning-gym is asked about.

    Args:
        text (`str`):
            The completion.
        reference (`str`):
            The right answer.

    Returns:
        `str`: what stands between the last `<answer>` tags; without any, what follows the last `=`; else all of it. Of
        that, the last number, where the right answer is one.

    Example:

    ```python
    >>> final_answer("The answer to 5 - 9 is -4.", reference="-4"), final_answer("5 - 9 = -4", reference="-4")
    ('-4', '-4')
    >>> final_answer("It is <answer>olleh</answer>.", reference="olleh")
    'olleh'

    ```
    """
    from reasoning_gym.utils import extract_answer

    answer: str = extract_answer(text) or text.rpartition("=")[2].strip()
    numbers = NUMBER.findall(answer) if NUMBER.fullmatch(str(reference)) else []
    return numbers[-1] if numbers else answer


def solved(entry: Mapping[str, Any]) -> list[dict[str, str]]:
    """
    A question and its answer; of an equation, as the whole equation, which a small model completes more easily.

    Example:

    ```python
    >>> solved({"question": "State the result: 2 + 3 =", "answer": "5"})[-1]["content"]
    '2 + 3 = 5'

    ```
    """
    question, answer = entry["question"], str(entry["answer"])
    if question.endswith("="):
        answer = f"{question.rpartition(': ')[2]} {answer}"
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
