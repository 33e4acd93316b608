"""``generate()``: prefill and decode, batches with padding, rows that end early, with and without a
cache: the same decisions.
"""

import polars as pl
import pytest
import torch
from refusals import refused

transformers = pytest.importorskip("transformers", reason="needs the extra hf")

from hf_capture_models import build  # noqa: E402

from moe_lab.errors import TraceError  # noqa: E402
from moe_lab.trace import capture, open_trace  # noqa: E402

pytestmark = pytest.mark.hf

PAD, END = 0, 2


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v3"])
def model(request):
    seed = next(
        seed
        for seed in range(20)
        if any(n.endswith("mlp.gate") for n, _ in build(request.param, seed)[1].named_modules())
    )
    _, model = build(request.param, seed)
    model.generation_config.update(pad_token_id=PAD, eos_token_id=END)
    return model


def prompts(lengths):
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (length,), generator=generator) for length in lengths]


def left_padded(rows):
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :], mask[place, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


def decisions(folder):
    return (
        open_trace(folder)
        .check()
        .routing.select("layer", "doc", "pos", "experts")
        .sort("layer", "doc", "pos")
        .collect()
    )


def test_prefill_and_decode_are_told_apart_and_positions_go_on(model, tmp_path):
    rows = prompts([7, 4])
    with torch.no_grad(), capture(model, tmp_path / "t"):
        output = model.generate(
            **left_padded(rows), max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
    trace = open_trace(tmp_path / "t").check()
    tokens = trace.tokens.sort("doc", "pos").collect()
    for doc, row in enumerate(rows):
        mine = tokens.filter(pl.col("doc") == doc)
        made = output[doc, 7:].tolist()
        assert mine["token_id"].to_list() == [
            *row.tolist(),
            *made[:-1],
        ]  # the last token is never fed
        assert mine["pos"].to_list() == list(range(len(row) + 4))
        assert mine["phase"].to_list() == ["prefill"] * len(row) + ["decode"] * 4
    assert trace.meta.phase == "generate"


def test_a_batch_is_what_its_rows_are_one_by_one(model, tmp_path):
    rows = prompts([7, 4, 5])
    with torch.no_grad(), capture(model, tmp_path / "batch"):
        model.generate(**left_padded(rows), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    with torch.no_grad(), capture(model, tmp_path / "single"):
        for row in rows:
            model.generate(
                **left_padded([row]), max_new_tokens=4, min_new_tokens=4, do_sample=False
            )
    assert decisions(tmp_path / "batch").equals(decisions(tmp_path / "single"))


def test_without_a_cache_the_text_is_not_counted_again(model, tmp_path):
    rows = left_padded(prompts([6, 3]))
    for cache in (True, False):
        with torch.no_grad(), capture(model, tmp_path / str(cache)):
            model.generate(
                **rows, max_new_tokens=4, min_new_tokens=4, do_sample=False, use_cache=cache
            )
    assert decisions(tmp_path / "True").equals(decisions(tmp_path / "False"))
    phases = [
        open_trace(tmp_path / str(cache)).tokens.sort("doc", "pos").collect()["phase"]
        for cache in (True, False)
    ]
    assert phases[0].equals(phases[1])


def test_a_row_that_has_ended_is_fed_padding_that_is_not_counted(model, tmp_path):
    rows = prompts([6, 3])
    with torch.no_grad():
        free = model.generate(
            **left_padded(rows), max_new_tokens=5, min_new_tokens=5, do_sample=False
        )
    end = int(free[0, 7])  # the second token that the first row makes
    with torch.no_grad(), capture(model, tmp_path / "t"):
        output = model.generate(
            **left_padded(rows), max_new_tokens=5, do_sample=False, eos_token_id=end
        )
    tokens = open_trace(tmp_path / "t").check().tokens.sort("doc", "pos").collect()
    for doc, row in enumerate(rows):
        made = output[doc, 6:].tolist()
        stop = made.index(end) if end in made else len(made) - 1
        assert tokens.filter(pl.col("doc") == doc)["token_id"].to_list() == [
            *row.tolist(),
            *made[:stop],
        ]


@pytest.mark.parametrize("end", [END, None])
def test_an_answer_that_holds_the_padding_id_goes_on(model, tmp_path, end):
    rows, made = prompts([6, 6]), [10, PAD, 12, END if end is None else 13, 14]

    class Force(transformers.LogitsProcessor):
        def __call__(self, ids, scores):
            forced = torch.full_like(scores, -1e9)
            forced[:, made[ids.shape[1] - 6]] = 0
            return forced

    before = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = end
    with torch.no_grad(), capture(model, tmp_path / "t"):
        model.generate(
            **left_padded(rows),
            max_new_tokens=5,
            do_sample=False,
            logits_processor=transformers.LogitsProcessorList([Force()]),
        )
    model.generation_config.eos_token_id = before
    tokens = open_trace(tmp_path / "t").check().tokens.sort("doc", "pos").collect()
    assert tokens["token_id"].to_list() == [t for row in rows for t in (*row.tolist(), *made[:-1])]


def test_losses_go_on_from_prefill_to_decode(model, tmp_path):
    row = prompts([6])[0]
    with torch.no_grad(), capture(model, tmp_path / "t", losses=True):
        output = model.generate(
            **left_padded([row]), max_new_tokens=4, min_new_tokens=4, do_sample=False
        )
    with torch.no_grad():
        logits = model(input_ids=output[:, :-1]).logits
    want = torch.nn.functional.cross_entropy(
        logits[0, :-1].float(), output[0, 1:-1], reduction="none"
    )
    got = open_trace(tmp_path / "t").tokens.sort("pos").collect()["loss"]
    assert got[:6].null_count() == 6  # generate() keeps the logits of the prompt's last token alone
    torch.testing.assert_close(torch.tensor(got[6:].to_list()), want[5:], rtol=1e-3, atol=1e-4)


def test_searches_that_move_texts_between_rows_are_refused(model, tmp_path):
    with refused("num_beams", TraceError):
        search(model, tmp_path / "t", num_beams=3)
    with refused("prompt_lookup_num_tokens", TraceError):
        search(model, tmp_path / "t", prompt_lookup_num_tokens=2)
    assert "generate" not in model.__dict__


def search(model, folder, **options):
    with torch.no_grad(), capture(model, folder):
        model.generate(**left_padded(prompts([4])), max_new_tokens=2, **options)


def stacks(model):
    names = [name for name, _ in model.named_modules() if name.endswith("router")]
    return len({name.split(".")[0] for name in names})


def test_an_encoder_decoder_is_traced_one_stack_at_a_time(tmp_path):
    config, model = next(
        built
        for built in (build("switch_transformers", seed) for seed in range(20))
        if stacks(built[1]) == 2
    )
    with refused("only", TraceError):
        capture(model, tmp_path / "t")
    ids, mask = torch.randint(3, 90, (2, 9)), torch.ones(2, 9, dtype=torch.long)
    mask[1, 6:] = 0
    for stack in ("encoder", "decoder"):
        with torch.no_grad(), capture(model, tmp_path / stack, only=rf"^{stack}\."):
            model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids[:, :5])
    assert open_trace(tmp_path / "encoder").check().num_tokens == 15
    assert open_trace(tmp_path / "decoder").check().num_tokens == 10
    assert config.is_encoder_decoder
