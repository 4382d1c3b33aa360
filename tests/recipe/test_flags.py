"""Wrong flags, options and values end in one line with what was meant; scripts and the console share the parser."""

import sys
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from kit import ROOT
from trl import ModelConfig, TrlParser

from trl_grpo_ext import AdaptiveGRPOConfig
from trl_grpo_ext.recipe import DataArguments, check
from trl_grpo_ext.recipe.flags import FlagParser, flags_with_config, meant

CPU = ["--output_dir", "out", "--bf16", "false", "--use_cpu", "true"]


@dataclass
class Mine:
    colour: str = field(default="red", metadata={"help": "A colour."})
    weights: list[float] = field(default_factory=list, metadata={"help": "Some weights."})


def parser(config=None):
    return FlagParser((Mine, AdaptiveGRPOConfig, ModelConfig), config, prog="mine")


@pytest.fixture
def written(tmp_path):
    def write(text):
        (tmp_path / "a.yaml").write_text(text)
        return str(tmp_path / "a.yaml")

    return write


def test_right_flags_give_what_trl_gives(written):
    flags = ["--config", written("colour: green\nlearning_rate: 1e-5\nmax_steps: 7\n"), *CPU, "--weights", "1", "-2"]
    ours = parser().parse(flags)
    theirs = TrlParser((Mine, AdaptiveGRPOConfig, ModelConfig)).parse_args_and_config(flags)
    assert [one.__dict__.keys() for one in ours] == [one.__dict__.keys() for one in theirs]
    assert ours[0] == theirs[0] == Mine("green", [1.0, -2.0])
    assert (ours[1].learning_rate, ours[1].max_steps) == (1e-5, 7) == (theirs[1].learning_rate, theirs[1].max_steps)


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--lerning_rate", "0.1"], "--lerning_rate is no option: did you mean --learning_rate?"),
        (["--lerning-rate=0.1"], "--lerning-rate is no option: did you mean --learning_rate?"),
        (["--color", "red"], "--color is no option: did you mean --colour?"),
        (["--xyzzy"], "--xyzzy is no option (--help lists them)"),
        (["--color", "red", "--xyzzy"], "--color is no option: did you mean --colour?; --xyzzy is no option (--help"),
        (["--max_steps", "many"], "argument --max_steps/--max-steps: invalid int value: 'many'"),
        (["--group_size", "varaince"], "argument --group_size/--group-size: invalid choice: 'varaince'"),
        (["--max_", "3"], "ambiguous option: --max_ could match"),
        (["--colour"], "argument --colour: expected one argument"),
        (["--max_steps", "3", "4"], "'4' belongs to no option: a flag comes before its values"),
        (["--group_size", "variance", "--min_group_size", "9", "--max_group_size", "4"], "min_group_size=9 exceeds"),
        (["--config=nope.yaml"], "--config nope.yaml: there is no such file (looked for /"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, line, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parser().parse([*CPU, *flags])
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"mine: error: {line}")
    assert printed.err.count("\n") == 1


@dataclass
class Picky:
    """Refuses every machine, as a configuration with bf16 refuses one without a GPU."""

    size: int = field(default=1, metadata={"help": "A size."})

    def __post_init__(self):
        raise ValueError("not on this machine")


@pytest.mark.parametrize(
    ("flags", "text", "line"),
    [
        (["--siez", "3"], "", "--siez is no option: did you mean --size?"),
        (["--xyzzy"], "", "--xyzzy is no option (--help lists them)"),
        (["3"], "", "'3' belongs to no option: a flag comes before its values"),
        ([], "siez: 3\n", "a.yaml sets 'siez', which is no option: did you mean size?"),
        (["--port", "1"], "size: 3\n", "not on this machine"),
    ],
)
def test_a_wrong_flag_is_told_before_what_the_configuration_refuses(flags, text, line, written, capsys):
    path = written(text or "{}")
    with pytest.raises(SystemExit, match=r"^2$"):
        FlagParser((Picky,), prog="mine").parse_with_others([*flags, "--config", path], ["--port"])
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith("mine: error: ")
    assert line in error


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("lerning_rate: 0.1\n", "a.yaml sets 'lerning_rate', which is no option: did you mean learning_rate?"),
        ("max_steps: many\n", "argument --max_steps/--max-steps: invalid int value: 'many'"),
        ("- a\n- b\n", "must contain a YAML mapping"),
        ("a: [1\nb: 2\n", "expected ',' or ']'"),
        ("env: [1]\n", "`env` field should be a dict"),
    ],
)
def test_a_wrong_file_is_one_line(text, problem, written, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        parser().parse([*CPU, "--config", written(text)])
    error = capsys.readouterr().err
    assert problem in error
    assert error.count("\n") == 1


def test_of_several_processes_the_first_speaks(monkeypatch, capsys):
    for rank, lines in (("1", 0), ("0", 1)):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(SystemExit, match=r"^2$"):
            parser().parse(["--xyzzy"])
        assert capsys.readouterr().err.count("\n") == lines


def test_flags_of_someone_else_are_left_to_them(written, capsys):
    path = written("num_processes: 2\ncolour: blue\n")
    flags = [*CPU, "--weights", "1", "2", "--port", "2", f"--config={path}", "--gpu=0", "--max_steps", "2"]
    parsed, of_file, of_line = parser().parse_with_others(flags, ["--num_processes", "--port", "--gpu"])
    assert parsed[0] == Mine("blue", [1.0, 2.0])
    assert (of_file, of_line) == (["--num_processes", "2"], ["--port", "2", "--gpu=0"])
    with pytest.raises(SystemExit):
        parser().parse_with_others([*flags, "--prt", "3"], ["--num_processes", "--port", "--gpu"])
    assert "--prt is no option: did you mean --port?" in capsys.readouterr().err


def test_a_script_has_a_configuration_of_its_own(written):
    path = written("colour: blue\n")
    assert parser(path).parse(CPU)[0].colour == "blue"
    assert parser(path).parse([*CPU, "--colour", "grey"])[0].colour == "grey"


def test_a_preset_is_found_beside_the_configuration_of_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = str(ROOT / "recipes" / "configs" / "helpful.yaml")
    found = flags_with_config(["--config=presets/small.yaml", "--a"], config)
    assert found == ["--config", str(ROOT / "recipes" / "configs" / "presets" / "small.yaml"), "--a"]
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "small.yaml").write_text("")  # what is here is meant first
    assert flags_with_config(["--config", "presets/small.yaml"], config) == ["--config", "presets/small.yaml"]
    with pytest.raises(ValueError, match=rf"looked for {tmp_path}/no.yaml and {ROOT}/recipes/configs/no.yaml"):
        flags_with_config(["--config", "no.yaml"], config)
    with pytest.raises(ValueError, match=rf"looked for {tmp_path}/no.yaml\)"):
        flags_with_config(["--config", "no.yaml"])


@given(st.lists(st.sampled_from(["--a", "1", "-2", "--b=3", "x y"]), max_size=6), st.integers(0, 6))
def test_config_is_found_wherever_it_stands(flags, at):
    name = str(ROOT / "mkdocs.yml")
    for form in ([f"--config={name}"], ["--config", name]):
        words = flags_with_config([*flags[:at], *form, *flags[at:]], "other.yaml")
        assert words == [*flags[:at], "--config", name, *flags[at:]]


@given(st.sampled_from(sorted(AdaptiveGRPOConfig.__dataclass_fields__)), st.data())
def test_one_letter_left_out_is_found(name, data):
    names = [f"--{option}" for option in AdaptiveGRPOConfig.__dataclass_fields__]
    at = data.draw(st.integers(0, len(name) - 1))
    typed = name[:at] + name[at + 1 :]
    if len(name) > 5 and f"--{typed}" not in names:
        assert meant(f"--{typed}", names).startswith(": did you mean --")


def test_the_check_of_the_machine_speaks_in_one_line_too(monkeypatch, capsys):
    with pytest.raises(SystemExit, match=r"^2$"):
        check.main(["--tolerence", "0.1"])
    line = "trl-grpo-ext machine: error: --tolerence is no option: did you mean --tolerance?\n"
    assert capsys.readouterr().err == line
    with pytest.raises(SystemExit, match=r"^2$"):
        check.main(["--checks", "stok"])
    assert "checks=['stok'] are unknown: use some of stock, ranks" in capsys.readouterr().err


def test_recipes_speak_in_one_line(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT / "recipes"))
    for name in ("helpful", "harmless", "multi_turn", "hierarchical"):
        module = __import__(name)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--lenght_weight", "0.1"])
        arguments = next(
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, DataArguments) and value is not DataArguments
        )
        with pytest.raises(SystemExit, match=r"^2$"):
            module.parse_arguments(arguments, module.__file__)
        assert capsys.readouterr().err == (
            f"{name}.py: error: --lenght_weight is no option: did you mean --length_weight?\n"
        )
