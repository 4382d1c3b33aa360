"""
Train the head of [`~trl_grpo_ext.rewards.Harmlessness`] on the labelled examples, and say how often it is wrong.

    python recipes/studies/harm_head.py            # prints the results
    python recipes/studies/harm_head.py --write    # and writes trl_grpo_ext/rewards/data/harm_head.npz

A support vector machine with a Gaussian kernel on sentence embeddings. It learns from the training split of
`harm.jsonl`, of the requests and references of `harmless.jsonl`, and of the references of `helpful.jsonl`; the test
splits of all three are held out. What is written has learned from the training splits alone.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedKFold, cross_val_predict
from sklearn.svm import SVC

import trl_grpo_ext
from trl_grpo_ext.rewards.embeddings import embed
from trl_grpo_ext.rewards.harm import HEAD, harm_of

PACKAGE = Path(trl_grpo_ext.__file__).parent
GAMMA, C = 1.0, 3.0  # the best of 0.5, 1, 1.5 and 3, 10 in the folds of the training split
FOLDS = StratifiedKFold(5, shuffle=True, random_state=0)
SAID = (
    "Get a pipe, and make a bomb of it.",
    "You can cut your wrists.",
    "Sucks air into the vacuum cleaner bag.",
    "Damn, that is a good cake.",
    "I can't help you build a bomb.",
    "Spread the rumour that she steals.",
)


@dataclass(frozen=True)
class Examples:
    """Texts, whether each is harmful, its kind, and whether it is held out."""

    texts: list[str]
    harmful: Any
    kinds: Any
    held_out: Any

    @classmethod
    def load(cls) -> "Examples":
        rows = [(row["text"], row["harmful"], row["kind"], row["split"]) for row in lines("rewards/data/harm.jsonl")]
        for row in lines("recipe/data/harmless.jsonl"):
            rows.append((row["prompt"], row["harmful"], "request", row["split"]))
            rows.append((row["reference"], False, "reference", row["split"]))
        rows += [(row["reference"], False, "reference", row["split"]) for row in lines("recipe/data/helpful.jsonl")]
        texts, harmful, kinds, splits = zip(*rows, strict=True)
        return cls(list(texts), np.array(harmful), np.array(kinds), np.array(splits) == "test")


def lines(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (PACKAGE / name).read_text(encoding="utf-8").splitlines()]


def machine() -> SVC:
    return SVC(C=C, gamma=GAMMA, class_weight="balanced")


def fit(embeddings_ND: Any, harmful_N: Any) -> dict[str, Any]:
    """What `harm_of` reads: examples in 8 bits, their weights and a bias, scaled so that a sigmoid is P(harmful)."""
    svm = machine().fit(embeddings_ND, harmful_N)
    margins_N = cross_val_predict(machine(), embeddings_ND, harmful_N, cv=FOLDS, method="decision_function")
    sigmoid = LogisticRegression(class_weight="balanced").fit(margins_N[:, None], harmful_N)
    slope = sigmoid.coef_[0, 0]
    scale = np.float32(np.abs(svm.support_vectors_).max() / 127)
    return {
        "examples": np.round(svm.support_vectors_ / scale).astype(np.int8),
        "scale": scale,
        "gamma": np.float32(GAMMA),
        "weights": (slope * svm.dual_coef_[0]).astype(np.float32),
        "bias": np.float32(slope * svm.intercept_[0] + sigmoid.intercept_[0]),
    }


def report(examples: Examples, embeddings_ND: Any, harm_N: Any) -> None:
    harmful_N, held_out_N = examples.harmful, examples.held_out
    wrong_N = (harm_N > 0.5) != harmful_N
    print(f"{(~held_out_N).sum()} texts to learn from, {(harmful_N & ~held_out_N).sum()} of them harmful")
    folds_N = cross_val_predict(machine(), embeddings_ND[~held_out_N], harmful_N[~held_out_N], cv=FOLDS)
    print(f"five folds of them: {(folds_N == harmful_N[~held_out_N]).mean():.3f} right")
    for name, rows_N in {
        "held out": held_out_N,
        "held out, harmful": held_out_N & harmful_N,
        "held out, harmless": held_out_N & ~harmful_N,
    }.items():
        print(f"{name}: {(~wrong_N)[rows_N].mean():.3f} of {rows_N.sum()} right")
    print(f"area under the curve, held out: {roc_auc_score(harmful_N[held_out_N], harm_N[held_out_N]):.3f}")
    print("\nkind, held out: right of all; right where the head learned from no example of the kind")
    for kind in dict.fromkeys(examples.kinds.tolist()):
        own_N = examples.kinds == kind
        test_N = own_N & held_out_N
        learned_N = ~own_N & ~held_out_N
        svm = machine().fit(embeddings_ND[learned_N], harmful_N[learned_N])
        alone = (svm.predict(embeddings_ND[own_N]) == harmful_N[own_N]).mean()
        print(f"{kind:20} {(~wrong_N)[test_N].sum():3} of {test_N.sum():3}; {alone:.2f} of {own_N.sum()}")
    print("\nmistakes, held out")
    for row in sorted(np.flatnonzero(wrong_N & held_out_N), key=lambda row: -abs(harm_N[row] - 0.5)):
        print(f"{1 - harm_N[row]:.2f}  {examples.texts[row]}")
    print("\nharmlessness")
    for text, harm in zip(SAID, harm_of(embed(list(SAID))), strict=True):
        print(f"{1 - harm:.2f}  {text}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="write the head into the package")
    write = parser.parse_args().write
    examples = Examples.load()
    embeddings_ND = embed(examples.texts)
    if write:
        learned_N = ~examples.held_out
        np.savez_compressed(HEAD, **fit(embeddings_ND[learned_N], examples.harmful[learned_N]))
    report(examples, embeddings_ND, np.array(harm_of(embeddings_ND)))


if __name__ == "__main__":
    main()
