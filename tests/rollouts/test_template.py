"""What stands between two answers: for all templates that TRL ships, and for one of each kind that there is."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import make_model, make_tokenizer
from rollout_helpers import Recorder, user
from trl import chat_template_utils

from trl_grpo_ext.rollouts.template import TurnTemplate

TRL_TEMPLATES = sorted((Path(chat_template_utils.__file__).parent / "chat_templates").glob("*.jinja"))
# Beginning of the name -> the token with which these models end an answer; the others have <|im_end|>.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend▁of▁sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma4": "<turn|>",
    "gemma": "<end_of_turn>",
    "glm": "<|user|>",
    "gptoss": "<|return|>",
    "llama3": "<|eot_id|>",
    "llava": "</s>",
    "muse": "<|eot|>",
    "phi": "<|end|>",
    "idefics": "<end_of_utterance>",
    "smolvlm": "<end_of_utterance>",
}
# Those that cannot be carried on, most of which have a training version in TRL that can.
REWRITE = {"qwen3", "qwen3_5_think", "qwen3_5_nothink", "qwen3_6"}
REPLACE_END = {"gptoss", "gptoss_training"}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def tokenizer_of(template: str, *tokens: str):
    tokenizer = make_tokenizer()
    roles = ["<|user|>", "<|assistant|>", "<|system|>"]
    special = dict.fromkeys([*re.findall("<[|\uff5c]?[/\\w▁]+[|\uff5c]?>", template), *roles, "<|stop|>", *tokens])
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.bos_token = "<|stop|>"
    tokenizer.chat_template = template
    return tokenizer


def read(tokenizer, *ends: str) -> TurnTemplate:
    return TurnTemplate(tokenizer, tokenizer, tokenizer.convert_tokens_to_ids(list(ends)))


def render(template: TurnTemplate, messages, add_generation_prompt: bool = True) -> str:
    messages = [template._in_form(message) for message in messages]
    return template.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)


def check_conversation(template: TurnTemplate, turns, others: str = "") -> None:
    """
    Carry a conversation on by tokens, and hold what stands between the answers against renderings as text.

    `turns` has the text of each answer, how it ends (the tokens that the model wrote behind the text), which part of
    what the template writes there that is, and what the user says to it.
    """
    tokenizer = template.tokenizer
    messages = [user("begin")]
    for text, ending, is_part, said in turns:
        ids = tokenizer(text + ending, add_special_tokens=False)["input_ids"]
        between = template.between(messages, [user(said)])
        written = tokenizer.decode(ids + template.rest(ids, between))
        messages += [assistant(text), user(said)]
        rendered = render(template, messages)
        expected = rendered[rendered.rindex(text) :]
        if not is_part:
            expected = expected.replace(text, text + ending, 1)
        assert written == expected


def end_of(path: Path) -> str:
    return next((end for start, end in ENDS.items() if path.stem.startswith(start)), "<|im_end|>")


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_templates_of_trl(path):
    end = end_of(path)
    tokenizer = tokenizer_of(path.read_text(encoding="utf-8"), end)
    if path.stem.startswith(("phi", "llava")):  # these write the tokenizer's
        tokenizer.eos_token = "<|stop|>" if path.stem.startswith("phi") else end
    if path.stem in REWRITE | REPLACE_END:
        with pytest.raises(ValueError, match="differently" if path.stem in REWRITE else "ends the last answer with"):
            read(tokenizer, end, "<|stop|>")
        return
    template = read(tokenizer, end, "<|stop|>")
    before = "<|END_RESPONSE|>" if path.stem.startswith("cohere2") else ""
    endings = [(before + end, True), ("", True), ("<|stop|>", False)]
    turns = [(f"xq{i}z", ending, is_part, f"say {i}") for i, (ending, is_part) in enumerate([*endings, *endings[::-1]])]
    check_conversation(template, turns)
    if before:  # an answer that forgot the first of the two tokens is not given both
        ids = tokenizer("xqz" + end, add_special_tokens=False)["input_ids"]
        rest = template.rest(ids, template.between([user("a")], [user("b")]))
        assert tokenizer.decode(rest).startswith("<|START_OF_TURN_TOKEN|>")


# One of each kind: template, tokens that end an answer, and how an answer may end itself as the template would.
KINDS = {
    "a token of its own": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_end|>"],
        ["<|im_end|>"],
    ),
    "a line break behind it": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
        ["<|im_end|>"],
        ["<|im_end|>"],
    ),
    "white space before it": (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %}{{ m.content }} <|end|>{% endif %}{% endfor %}",
        ["<|end|>"],
        [" <|end|>"],
    ),
    "the token of the next role": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|user|>", "<|system|>"],
        ["<|user|>"],
    ),
    "the token of the next role in a new line": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|user|>"],
        ["\n<|user|>"],
    ),
    "the token of the next role, which the finished conversation has too": (
        "{% for m in messages %}{% if m.role == 'user' %}{% if loop.first %}<|user|>{% endif %}\n{{ m.content }}"
        "{% else %}<|assistant|>{{ m.content }}<|user|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|user|>"],
        ["<|user|>"],
    ),
    "an end of its own, then the token of the next role, of which only that one stops": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|user|>"],
        ["<|end|>\n<|user|>", "<|end|>"],
    ),
    "eos behind a finished conversation": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        ["<|end|>", "<|im_end|>"],
        ["<|end|>"],
    ),
    "eos behind a finished conversation whose turns have no end": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}{% if not loop.last or add_generation_prompt %}\n"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}assistant: {% else %}{{ eos_token }}{% endif %}",
        ["<|im_end|>"],
        [],
    ),
    "eos behind a finished conversation whose turns end with the next role": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% else %}{{ eos_token }}{% endif %}",
        ["<|im_end|>", "<|user|>"],
        ["<|user|>"],
    ),
    "no end at all": (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
        ["<|stop|>"],
        [],
    ),
    "thinking": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}",
        ["<|im_end|>"],
        ["<|im_end|>"],
    ),
    "two tokens": (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|><|turn|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|turn|>"],
        ["<|end|><|turn|>", "<|end|>"],
    ),
    "a count of turns": (
        "{% for m in messages %}<|{{ m.role }}|>{{ loop.index }}. {{ m.content }}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        ["<|end|>"],
        ["<|end|>"],
    ),
}
texts = st.text("abcxyz .,:", min_size=1, max_size=8).map(lambda text: f"q{text}z")


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(deadline=None, max_examples=20)
def test_kinds_of_templates(kind, data):
    source, ends, endings = KINDS[kind]
    template = read(tokenizer_of(source, *ends), *ends, "<pad>")
    choices = [(ending, True) for ending in ["", *endings]] + [("<pad>", False)]
    turns = data.draw(st.lists(st.tuples(texts, st.sampled_from(choices), texts), min_size=1, max_size=4))
    check_conversation(template, [(f"{text}{i}", *ending, said) for i, (text, ending, said) in enumerate(turns)])


def test_an_end_of_text_behind_the_end_of_a_turn_does_not_double_that():
    """As of a model that learned to finish conversations, but stops at the end of text alone."""
    source = KINDS["eos behind a finished conversation"][0]
    tokenizer = tokenizer_of(source)
    template = read(tokenizer, "<|im_end|>")
    between = template.between([user("a")], [user("b")])
    for ending, rest in (
        ("<|end|>\n<|im_end|>", "<|user|>\nb<|end|>\n<|assistant|>\n"),
        ("<|end|><|im_end|>", "\n<|user|>\nb<|end|>\n<|assistant|>\n"),
        ("<|im_end|>", "<|end|>\n<|user|>\nb<|end|>\n<|assistant|>\n"),
    ):
        ids = tokenizer("hm" + ending, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(template.rest(ids, between)) == rest


def test_text_that_looks_like_the_next_turn_stays():
    """Where turns have no token of their own, an answer may end by chance as the next turn begins."""
    source, ends, _ = KINDS["no end at all"]
    tokenizer = tokenizer_of(source)
    template = read(tokenizer, *ends)
    between = template.between([user("a")], [user("b")])
    for text in ("\n", "hm\nuser", "hm\nuser: "):
        assert template.rest(tokenizer(text)["input_ids"], between) == between
    assert template.rest([], between) == between


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ messages | length }} " + KINDS["no end at all"][0], "writes earlier turns differently"),
        (  # only from the second turn on
            "{% for m in messages[-3:] %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
            "{% if add_generation_prompt %}assistant: {% endif %}",
            "writes earlier turns differently",
        ),
        (
            "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
            "{% if loop.last and not add_generation_prompt %}<|im_end|>{% else %}<|end|>{% endif %}{% endfor %}"
            "{% if add_generation_prompt %}<|assistant|>{% endif %}",
            r"ends the last answer with '<\|im_end\|>' and earlier ones with '<\|end\|>'",
        ),
        (
            "{% for m in messages %}{% if loop.index > 2 %}{{ raise_exception('one turn, please') }}{% endif %}"
            "{{ m.content }}{% endfor %}",
            "raises TemplateError for a conversation of user, assistant, user: one turn, please",
        ),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves out what the user says"),
    ],
)
def test_templates_that_cannot_be_carried_on_are_refused(source, message):
    with pytest.raises(ValueError, match=message):
        read(tokenizer_of(source), "<|im_end|>")


@pytest.mark.parametrize("history", ["shared", "independent"])
def test_a_turn_that_ends_with_the_next_role_has_that_token_once(history, trained):
    """As in GLM-4.x: the model writes <|user|>, is trained on it, and the template does not write it again."""
    source, ends, _ = KINDS["the token of the next role"]
    tokenizer = tokenizer_of(source)
    model = make_model(tokenizer)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(ends)
    end = tokenizer.convert_tokens_to_ids("<|user|>")

    class Polite(Recorder):
        """Every second answer ends itself, the others are cut off."""

        def _generate_single_turn(self, prompt_ids, *args, **kwargs):
            return [[20 + i % 9, 30] + [end] * (i % 2) for i in range(len(prompt_ids))], None

    options = {"rollout": "multi_turn", "history": history, "max_steps": 1}
    trainer = trained(model=model, processing_class=tokenizer, cls=Polite, **options)
    seen = set()
    for sequence in trainer.seen[0][0]:
        ids = sequence.prompt_ids + [token for a in sequence.answers for token in a.glue_ids + a.ids]
        ends_itself = ids[-1] == end
        messages = [*sequence.prompt, *sequence.completion]
        assert ids.count(end) == sum(message["role"] == "user" for message in messages) + ends_itself
        seen.add((len(messages), ends_itself))
    assert len(seen) > 3
