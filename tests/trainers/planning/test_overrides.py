"""overrides: the mirror of torchrun's parser, the flags that are supported, and `key=value`."""

from argparse import ArgumentParser
from itertools import accumulate

import pytest
from torch.distributed.run import get_args_parser

from trainers.planning.overrides import parse_overrides, parse_value, torchrun_mirror


def options_of(parser: ArgumentParser) -> dict[str, tuple[str, bool]]:
    """Every option string: what it sets, and whether it takes a value."""
    return {option: (action.dest, action.nargs != 0) for action in parser._actions for option in action.option_strings}


def test_the_mirror_has_every_option_of_torchrun() -> None:
    assert options_of(torchrun_mirror()) == options_of(get_args_parser())


def test_abbreviations_mean_what_they_mean_to_torchrun() -> None:
    theirs, ours = get_args_parser(), torchrun_mirror()
    for option in options_of(theirs):
        for prefix in accumulate(option):
            if prefix.startswith("--") and len(prefix) > 2:
                assert meanings(theirs, prefix) == meanings(ours, prefix), prefix


def meanings(parser: ArgumentParser, prefix: str) -> set[str]:
    """The options that argparse would take `prefix` for."""
    if prefix in parser._option_string_actions:
        return {prefix}
    return {match[1] for match in parser._get_option_tuples(prefix)}


@pytest.mark.parametrize(
    "text",
    [
        "--nproc_per_node 2 --nnodes 3 --max-restarts 1",
        "--nproc-per-node=2 --nnodes=3 --max_restarts=1",
        "--nproc-per 2 --nno 3 --max-r 1",
        "seed=1 --nnodes 3 lr=1 --nproc_per_node 2 --max-restarts 1 epochs=2",
    ],
)
def test_the_three_flags_are_read_in_every_spelling(text: str) -> None:
    overrides, problems = parse_overrides(text)
    assert not problems
    assert overrides[:3] == (3, 2, 1)


def test_without_overrides_there_is_one_worker_and_three_restarts() -> None:
    for text in (None, "", "   "):
        overrides, problems = parse_overrides(text)
        assert (overrides, problems) == ((1, 1, 3, []), [])


@pytest.mark.parametrize(
    "text",
    [
        "--nproc_per_node 0",
        "--nproc_per_node -1",
        "--nproc_per_node 1.5",
        "--nproc_per_node two",
        "--nproc_per_node " + "9" * 3000,
        "--nnodes 0",
        "--max-restarts -1",
        "--nproc_per_node",
        "--n 2",
        "--frobnicate 2",
        "train.py",
        "=3",
        "'unbalanced",
        "~lr_scheduler",
    ],
)
def test_words_that_cannot_be_read_are_problems(text: str) -> None:
    _, problems = parse_overrides(text)
    assert problems
    assert all(problem.param == "overrides" and len(problem.message) < 300 for problem in problems)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("--nproc_per_node gpu", "--nproc_per_node gpu"),
        ("--nproc_per_node auto", "--nproc_per_node auto"),
        ("--nnodes 1:4", "--nnodes 1:4"),
        ("--standalone", "--standalone"),
        ("--rdzv_backend c10d", "--rdzv-backend"),
        ("--rdzv-endpoint=h:1", "--rdzv-endpoint"),
        ("--node_rank 0", "--node-rank"),
        ("--master_addr x", "--master-addr"),
        ("-r 3", "--redirects"),
        ("-m", "--module"),
        ("--help", "--help"),
    ],
)
def test_what_has_no_meaning_under_ray_is_refused_by_name(text: str, named: str) -> None:
    _, (problem,) = parse_overrides(text)
    assert problem.message.startswith(f"{named}: ")
    assert problem.code == "unsupported_override"


def test_every_torchrun_flag_is_honoured_or_refused() -> None:
    for option, (dest, takes_value) in options_of(torchrun_mirror()).items():
        overrides, problems = parse_overrides(f"{option} 7" if takes_value else option)
        honoured = dest in ("nnodes", "nproc_per_node", "max_restarts") and getattr(overrides, dest) == 7
        assert honoured or [problem.code for problem in problems] == ["unsupported_override"], option


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2e-5", 2e-5),
        ("7", 7),
        ("-1", -1),
        ("1.", 1.0),
        ("true", True),
        ("False", False),
        ("null", None),
        ("", None),
        ("torch.optim.SGD", "torch.optim.SGD"),
        ("[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("[0.9,0.95]", [0.9, 0.95]),
        ('["q_proj"]', ["q_proj"]),
        ('{"a": 1}', {"a": 1}),
        ('"7"', "7"),
        ("nan", "nan"),
        ("1_000", "1_000"),
        ("[" * 50_000, "[" * 50_000),
    ],
)
def test_values_of_settings_get_their_types(text: str, value: object) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)
