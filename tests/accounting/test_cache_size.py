"""What a decoding sequence keeps: against published figures, and in closed form."""

import pytest
from refusals import refused

from moe_lab.accounting import cache_size, count
from moe_lab.accounting.model_names import dense_facts

KB = {
    "deepseek-ai/DeepSeek-V3": 70.272,
    "Qwen/Qwen2.5-72B": 327.680,
    "meta-llama/Llama-3.1-405B": 516.096,
}
"""Per token in bfloat16: arXiv 2505.09343 table 1."""
GIB_AT_256K = {"ai21labs/Jamba-v0.1": 4, "mistralai/Mixtral-8x7B": 32}
"""In 16 bits at 256K tokens: arXiv 2403.19887 table 1 (the state of Mamba left out)."""


@pytest.mark.parametrize(("name", "kb"), KB.items())
def test_bytes_per_token_are_the_published_ones(name: str, kb: float) -> None:
    assert 2 * cache_size(name).per_token == pytest.approx(1000 * kb)


@pytest.mark.parametrize(("name", "gib"), GIB_AT_256K.items())
def test_a_long_context_is_as_large_as_published(name: str, gib: float) -> None:
    size = cache_size(name, 256 * 1024)
    assert 2 * (size.at_context - size.state) == gib * 2**30


def test_latent_attention_keeps_a_small_share_of_plain_attention() -> None:
    """arXiv 2405.04434: (512 + 64) numbers a layer; arXiv 2510.26692: up to 75 % less again."""
    assert cache_size("deepseek-ai/DeepSeek-V2").per_token == 60 * 576
    linear = cache_size("moonshotai/Kimi-Linear-48B-A3B-Instruct").per_token
    assert 1 - linear / (27 * 576) == pytest.approx(0.75, abs=0.01)


def test_a_window_keeps_its_last_keys_only() -> None:
    short, long = (cache_size("openai/gpt-oss-20b", context) for context in (100, 10_000))
    layer = 2 * 8 * 64
    assert short.at_context == 24 * layer * 100
    assert long.at_context == 12 * layer * (10_000 + 128)
    assert (long.per_token, long.growth) == (24 * layer, 12 * layer)


def test_a_recurrence_keeps_its_state_whatever_the_length() -> None:
    """Qwen3-Next: 36 layers of 32 heads of 128 x 128, and 3 inputs of a convolution."""
    state = 36 * (32 * 128 * 128 + 3 * (2 * 16 * 128 + 32 * 128))
    for context in (1, 1000):
        size = cache_size("Qwen/Qwen3-Next-80B-A3B", context)
        assert size.state == state
        assert size.at_context == state + 12 * 2 * 2 * 256 * context


def test_compressed_keys_count_once_for_the_positions_that_they_stand_for() -> None:
    """DeepSeek-V4-Flash: a window of 128 in every layer; keys of 4 or 128 positions beside it."""
    counted = count("deepseek-ai/DeepSeek-V4-Flash")
    kernels = [[piece.kernel for piece in pieces] for _, pieces in counted.layers[1:44]]
    rates = [max(getattr(kernel, "stride", 1) for kernel in layer) for layer in kernels]
    fine, coarse = rates.count(4), rates.count(128)
    size = cache_size(counted, 4096)
    assert size.at_context == (43 * 128 * 512 + fine * 1024 * (512 + 128) + coarse * 32 * 512)


def test_layers_that_read_the_keys_of_others_keep_none() -> None:
    shared = cache_size("tencent/Hunyuan-Large").per_token
    own = cache_size(count("tencent/Hunyuan-Large", {"use_cla": False})).per_token
    assert own == 2 * shared


def test_modules_of_multi_token_prediction_are_left_out() -> None:
    without = count("deepseek-ai/DeepSeek-V3", {"num_nextn_predict_layers": 0})
    assert cache_size(without) == cache_size("deepseek-ai/DeepSeek-V3")


def test_layers_that_run_several_times_keep_keys_of_each_pass() -> None:
    name = "thinkingmachines/Inkling-2-Mini"
    looped = cache_size(name)
    once = cache_size(count(name, {"loop_num_passes": 1}))
    assert looped.per_token == 2 * once.per_token  # 48 visits of 24 layers


@pytest.mark.parametrize("entry", dense_facts(), ids=lambda entry: entry["name"])
def test_a_dense_model_has_its_published_number_of_parameters(entry: dict) -> None:
    counted = count(entry["name"])
    assert counted.total == counted.active("A") == entry["parameters"]
    assert counted.moe_layers == {}


def test_a_context_of_nothing_is_refused() -> None:
    with refused("context"):
        cache_size("deepseek-ai/DeepSeek-V3", 0)
