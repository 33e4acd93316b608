"""``moe-lab train`` as it reads its options: kinds of router, amounts, wrong values."""

import json
from pathlib import Path

import pytest
from commands.test_cli import cache, corpus, fails, moe_lab  # noqa: F401

from moe_lab.routing import ROUTERS

NEEDS = {
    "adamoe": {"num_zero_experts": 2},
    "base": {"top_k": 1},
    "mixture_of_depths": {"num_experts": 1, "top_k": 1},
    "moepp": {"num_zero_experts": 2},
    "zaya": {"num_zero_experts": 1},
}
"""Sizes that a kind prescribes."""


@pytest.mark.parametrize("kind", sorted(ROUTERS))
def test_any_kind_of_router_can_be_set(
    kind: str,
    corpus: Path,  # noqa: F811
    cache: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Fields of the default router that the kind does not read fall back, with a note."""
    seen = []
    monkeypatch.setattr(
        "moe_lab.training.train", lambda config, *args, **kwargs: seen.append(config) or 1 / 0
    )
    sizes = [f"model.moe.router.{name}={value}" for name, value in NEEDS.get(kind, {}).items()]
    with pytest.raises(ZeroDivisionError):
        moe_lab(
            *("train", "--set", f"model.moe.router.kind={kind}", "--corpus", corpus),
            *("--tokenizer", "byte", "--tokens", "1.5k"),
            *(part for size in sizes for part in ("--set", size)),
            cache=cache,
        )
    (config,) = seen
    assert config.train_tokens == 1500
    assert config.model.moe.router.kind == kind
    config.model.build()


def test_alarms_and_validation_are_options(
    corpus: Path,  # noqa: F811
    cache: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = []
    monkeypatch.setattr(
        "moe_lab.training.train", lambda config, *args, **kwargs: seen.append(config) or 1 / 0
    )
    plain = ("train", "--corpus", corpus, "--tokenizer", "byte")
    for options in ((), ("--on-alarm", "stop", "--validate-every", 20)):
        with pytest.raises(ZeroDivisionError):
            moe_lab(*plain, *options, cache=cache)
    assert [(config.on_alarm, config.validate_every) for config in seen] == [
        ("record", None),
        ("stop", 20),
    ]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ("--set", "model.num_layers=abc"),
            "a whole number, got 'abc'; try --set model.num_layers=2",
        ),
        (
            ("--set", "model.moe.router.top_k=1.5"),
            "expected --set model.moe.router.top_k as a whole ",
        ),
        (("--set", "device=3"), "as text, got 3; try --set device=name"),
        (("--set", "no_such=1"), "no_such=1"),
        (
            ("--router", "warp"),
            "got 'warp'; try the --plugin that adds it; there are adamoe, ",
        ),
        (("--loss", "confidence"), "expected --loss NAME=COEFFICIENT"),
        (
            ("--loss", "warp=1"),
            "expected a loss, got 'warp'; try the --plugin that adds",
        ),
        (("--tokens", "1.0001k"), "a whole number above 0, with k, M, B or T"),
    ],
)
def test_a_wrong_value_is_one_line_that_says_what_was_expected(
    arguments: tuple[str, ...],
    expected: str,
    corpus: Path,  # noqa: F811
    cache: Path,  # noqa: F811
) -> None:
    assert expected in fails("train", *arguments, "--corpus", corpus, cache=cache)


def test_a_note_names_what_falls_back(
    corpus: Path,  # noqa: F811
    cache: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    ended = moe_lab(
        *("train", "--router", "noisy_topk", "--corpus", corpus, "--tokenizer", "byte"),
        *("--tokens", 1024, "--set", "eval_tokens=2000", "--out", tmp_path / "r"),
        *("--set", "model.moe.router.score_func=sigmoid"),
        cache=cache,
    )
    assert ended.returncode == 0, ended.stderr
    assert "kind 'noisy_topk' does not read score_func" in ended.stderr
    assert "norm_topk_prob" not in ended.stderr  # a default of the command: nobody asked for it
    written = json.loads((tmp_path / "r" / "config.json").read_text())
    assert written["model"]["moe"]["router"]["norm_topk_prob"] is False
