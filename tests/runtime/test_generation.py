"""Generating with a model whose every next token is known (`make_language_model`): whatever is fed wrongly shows."""

from __future__ import annotations

import dataclasses
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import edgekit
from edgekit.errors import BundleError, InputError
from edgekit.runtime import generation, system
from edgekit.runtime.bundle import Bundle
from edgekit.runtime.generation import Generator, load_generator
from edgekit.runtime.generation_memory import MemoryModel, check_weights_fit
from edgekit.runtime.onnxruntime_backend import OnnxRuntimeSession

MakeLanguageModel = Callable[..., Bundle]
PROMPTS = ["a", "three", "exactly sixteen!", "seventeen letters", "a prompt of several passes, thirty.."]


def following(prompt: str, count: int) -> list[int]:
    """What the toy model answers."""
    tokens = list(prompt.encode())
    for _ in range(count):
        total = sum(t * (p + 1) + (layer + 1) * t + t + 1 for p, t in enumerate(tokens) for layer in range(2))
        tokens.append(total % 257)
    return tokens[-count:]


@pytest.fixture
def toy(make_language_model: MakeLanguageModel) -> Generator:
    return load_generator(make_language_model(), threads=1)


@pytest.mark.parametrize("pass_tokens", [4, 8, 16])
@pytest.mark.parametrize("prompt", PROMPTS)
def test_every_token_follows_from_all_before(toy: Generator, prompt: str, pass_tokens: int) -> None:
    result = toy.generate(prompt, max_new_tokens=12, pass_tokens=pass_tokens)
    assert list(result.tokens[0]) == following(prompt, 12)
    assert result.finish == ("length",)
    assert max(result.statistics.passes) <= pass_tokens
    assert sum(result.statistics.passes) == len(prompt)
    assert all(tokens % 4 == 0 for tokens in result.statistics.passes[:-1])


@pytest.mark.parametrize("pass_tokens", [4, 16])
@pytest.mark.parametrize("order", [PROMPTS, PROMPTS[::-1]], ids=["short first", "long first"])
def test_texts_together_get_what_each_gets_alone(toy: Generator, order: list[str], pass_tokens: int) -> None:
    result = toy.generate(order, max_new_tokens=9, pass_tokens=pass_tokens)
    assert [list(tokens) for tokens in result.tokens] == [following(prompt, 9) for prompt in order]
    assert result.statistics.prompt_tokens == sum(map(len, order))
    assert result.statistics.new_tokens == 9 * len(order)
    with pytest.raises(InputError, match=r"there are 5 texts; take them from \.texts"):
        _ = result.text


def test_a_text_that_ends_early_leaves_the_others_alone(toy: Generator) -> None:
    wanted = [following(prompt, 8) for prompt in PROMPTS]
    ends = [wanted[0][0], wanted[2][3], wanted[3][5]]
    result = toy.generate(PROMPTS, max_new_tokens=8, eos=ends)
    for tokens, whole, finish in zip(result.tokens, wanted, result.finish, strict=True):
        length = next((place + 1 for place, token in enumerate(whole) if token in ends), 8)
        assert list(tokens) == whole[:length]
        assert finish == ("end" if whole[length - 1] in ends else "length")
    assert {"end", "length"} == set(result.finish)


def test_the_bundle_says_which_token_ends_a_text(make_language_model: MakeLanguageModel) -> None:
    end = following("three", 3)[-1]
    generator = load_generator(make_language_model(eos=(end,)))
    result = generator.generate("three", max_new_tokens=9)
    assert list(result.tokens[0]) == following("three", 3)
    assert result.finish == ("end",)
    assert result.text == bytes(token for token in result.tokens[0][:-1] if token < 256).decode(errors="replace")
    assert list(generator.generate("three", max_new_tokens=9, eos=()).tokens[0]) == following("three", 9)


def test_a_model_begins_a_text_with_bos(make_language_model: MakeLanguageModel) -> None:
    with_bos = load_generator(make_language_model(add_bos=True)).generate("a", max_new_tokens=1)
    assert with_bos.statistics.prompt_tokens == 2
    assert list(with_bos.tokens[0]) != following("a", 1)


def test_a_short_last_pass_is_filled_up_to_what_the_model_takes(make_language_model: MakeLanguageModel) -> None:
    generator = load_generator(make_language_model(least_tokens=3))
    for prompt, passes in (("a", (3,)), ("seventeen letters", (16, 3)), ("abc", (3,))):
        result = generator.generate(prompt, max_new_tokens=5)
        assert list(result.tokens[0]) == following(prompt, 5)
        assert result.statistics.passes == passes


def test_pieces_come_one_by_one_and_make_the_text(toy: Generator) -> None:
    stream = toy.stream(PROMPTS[:3], max_new_tokens=5)
    first = next(stream)
    assert (first.row, first.token, first.finish) == (0, following("a", 1)[0], None)
    so_far = stream.generated()
    assert [len(tokens) for tokens in so_far.tokens] == [1, 0, 0]
    assert so_far.finish == ("", "", "")
    pieces = [first, *stream]
    result = stream.finish()
    assert [piece.row for piece in pieces] == [0, 1, 2] * 5
    for row, text in enumerate(result.texts):
        mine = [piece for piece in pieces if piece.row == row]
        assert "".join(piece.text for piece in mine) == text
        assert [piece.finish for piece in mine] == [None] * 4 + ["length"]
        assert bytes(token for token in result.tokens[row] if token < 256).decode(errors="replace") == text


def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(toy: Generator) -> None:
    whole = toy.generate("three", max_new_tokens=20).text
    stop = whole[6:9]
    stream = toy.stream("three", max_new_tokens=20, stop=["never there", stop])
    pieces = list(stream)
    result = stream.finish()
    assert result.text == whole[: whole.index(stop)]
    assert "".join(piece.text for piece in pieces) == result.text
    assert result.finish == ("stop",)
    # What may be the beginning of a stop text is held back, and given when it is none.
    assert toy.generate("three", max_new_tokens=20, stop=whole[-2:] + "no").text == whole


def test_draws_repeat_with_their_seed(toy: Generator) -> None:
    options: dict[str, Any] = {"max_new_tokens": 12, "temperature": 3.0, "top_p": 0.9}
    alone = toy.generate("three", seed=5, **options)
    assert toy.generate("three", seed=5, **options).tokens == alone.tokens
    assert toy.generate("three", seed=6, **options).tokens != alone.tokens
    together = toy.generate(["three", "three", "a"], seed=5, **options)
    assert together.tokens[0] == alone.tokens[0]
    assert together.tokens[1] != alone.tokens[0]
    fresh = toy.generate("three", **options)
    assert fresh.statistics.seed is not None
    assert toy.generate("three", seed=fresh.statistics.seed, **options).tokens == fresh.tokens


def test_statistics_add_up(toy: Generator) -> None:
    took = toy.generate("a prompt of several passes", max_new_tokens=4).statistics
    assert took.passes == (16, 10)
    assert (took.prompt_tokens, took.new_tokens, took.seed) == (26, 4, None)
    assert 0 < took.prefill_seconds <= took.first_token_seconds
    assert took.tokens_per_second == pytest.approx(3 / took.decode_seconds)
    # 30 tokens of two layers' keys and values and of one row of ids; a table of 7 blocks of 4 chunks and 4 new ones.
    assert took.cache_bytes == 30 * (2 * (8 + 4) + 8) + (7 * 4 + 4) * 2 * 4
    assert toy.generate("a", max_new_tokens=1).statistics.tokens_per_second is None


def test_packed_bundles_generate(make_language_model: MakeLanguageModel) -> None:
    result = edgekit.generate(make_language_model().pack().path, "three", max_new_tokens=4)
    assert list(result.tokens[0]) == following("three", 4)


def test_load_still_gives_a_session_of_the_main_graph(make_language_model: MakeLanguageModel) -> None:
    session = edgekit.load(make_language_model())
    inputs = session.random_inputs(sizes={"tokens": 2, "past": 0, "total": 2, "chunks": 0})
    inputs["past_chunk_ids"][:] = 0
    inputs["attention_mask"][:] = 1
    assert session.run(inputs)["logits"].shape == (1, 1, 259)


def test_tensors_stay_with_onnxruntime_between_runs(toy: Generator) -> None:
    """The contract that `Generator` builds on: no copy on the way in, answers that can be fed back."""
    array = np.arange(3, dtype=np.int64)[None]
    value = OnnxRuntimeSession.value(array)
    array[0, 1] = 7
    assert value.numpy().tolist() == [[0, 7, 2]]
    outputs = toy.prefill.run_values(
        {"input_ids": value, "attention_mask": OnnxRuntimeSession.value(np.ones((1, 3), np.int64))}
        | toy._empty_cache(1)
    )
    assert outputs.keys() == {spec.name for spec in toy.prefill.outputs}
    assert outputs["present.0.key"].shape() == [1, 1, 3, 2]
    with pytest.raises(InputError, match="onnxruntime could not run toy-onnx: "):
        toy.prefill.run_values({"input_ids": value})


def test_an_interrupt_ends_a_long_run(toy: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        """A session whose runs last until they are told to end."""

        def run_with_ort_values(self, _: Any, __: Any, options: Any) -> Any:
            time.sleep(0.1)  # until the main thread waits
            os.kill(os.getpid(), signal.SIGINT)
            deadline = time.monotonic() + 20
            while not options.terminate and time.monotonic() < deadline:
                time.sleep(0.001)
            seen.append(options.terminate)
            raise RuntimeError("terminated")

    seen: list[bool] = []
    monkeypatch.setattr(toy.prefill, "_session", Slow())
    # A shell without job control lets its background processes ignore interrupts.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            toy.generate("three")
    finally:
        signal.signal(signal.SIGINT, before)
    assert seen == [True]


# What is refused, before anything is run.


@pytest.fixture
def untouched(toy: Generator, monkeypatch: pytest.MonkeyPatch) -> Generator:
    """A generator that fails the test where a graph is run."""

    def run(*_: object, **__: object) -> Any:
        pytest.fail("a graph was run")

    monkeypatch.setattr(OnnxRuntimeSession, "run_values", run)
    return toy


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ([], {}, "expected a prompt or a list of prompts"),
        (["fine", ""], {}, "the prompt is empty"),
        (b"bytes", {}, "must be a text, got int"),
        (None, {}, "expected a prompt or a list of prompts, got None"),
        ("\udcff", {}, "no UTF-8 text: the byte 0xff"),
        ("a", {"temperature": -1}, "temperature must be"),
        ("a", {"temperature": 1, "top_p": 0}, "top_p must be"),
        ("a", {"seed": -1}, "seed must be"),
        ("a", {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1, got 0"),
        ("a", {"max_new_tokens": 2.5}, "max_new_tokens must be an integer of at least 1, got 2.5"),
        ("a", {"stop": ""}, "stop must be texts that are not empty"),
        ("a", {"pass_tokens": 6}, "pass_tokens must be a multiple of the block size, 4; got 6"),
        ("a", {"pass_tokens": 0}, "pass_tokens must be a multiple of the block size, 4; got 0"),
        (["a"] * 9, {}, "takes 1 to 8 texts at a time, got 9 prompts"),
        ("a" * 60, {"max_new_tokens": 5}, "context longer than the cache: 60 prompt and 5 new tokens are 65, but "),
        ("a" * 60, {"max_new_tokens": 5}, "toy-onnx holds 64; ask for at most 4 new tokens, or shorten the prompt"),
        ("a" * 64, {"max_new_tokens": 1}, "toy-onnx holds 64; shorten the prompt"),
    ],
)
def test_misuse_is_told_before_anything_is_run(
    untouched: Generator, prompts: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        untouched.stream(prompts, **options)


def test_the_context_can_be_used_to_the_last_token(toy: Generator) -> None:
    prompt = "a" * 60
    assert list(toy.generate(prompt, max_new_tokens=4).tokens[0]) == following(prompt, 4)
    assert list(toy.generate(prompt).tokens[0]) == following(prompt, 4)  # as many as there is room for


def test_other_bundles_take_no_prompt(tiny_bundle: Bundle) -> None:
    with pytest.raises(InputError, match=r"tiny-onnx is no language model, so it takes no prompt; it takes x: float32"):
        load_generator(tiny_bundle)


def test_threads_are_checked(make_language_model: MakeLanguageModel) -> None:
    with pytest.raises(InputError, match="threads must be at least 1, got 0"):
        load_generator(make_language_model(), threads=0)


def test_graphs_whose_caches_do_not_fit_are_refused(make_language_model: MakeLanguageModel) -> None:
    bundle = make_language_model()
    generator = load_generator(bundle)
    generator._decode_past["past_more"] = "present_more"
    with pytest.raises(BundleError, match="the model graph gives no 'present_more' for the cache"):
        generator._check_graphs()


# Memory.


def memory_model(bundle: Bundle, **changes: Any) -> MemoryModel:
    manifest = bundle.manifest
    model = dataclasses.replace(manifest.model, **changes)
    return MemoryModel(dataclasses.replace(manifest, model=model), bundle.part("decode").manifest)


def test_cache_bytes_are_those_of_the_tensors(toy: Generator) -> None:
    stream = toy.stream(["three", "seventeen letters"], max_new_tokens=7)
    outputs: dict[str, Any] = {}
    run = toy.decode.run_values
    toy.decode.run_values = lambda inputs: outputs.update(run(inputs)) or outputs  # type: ignore[method-assign]
    stream.finish()
    held = sum(value.numpy().nbytes for name, value in outputs.items() if name != "logits")
    # The last token is not read any more; of the 17 prompt tokens, the table counts whole blocks.
    assert toy._memory.cache_bytes(2, 17, 6) == held + 3 * 2 * 2 * 4
    assert stream.plan.cache_bytes == toy._memory.cache_bytes(2, 17, 7)


def test_longer_passes_need_more(make_language_model: MakeLanguageModel) -> None:
    memory = memory_model(make_language_model(context=4096, pass_tokens=1024), parameters=10**7)
    needed = [memory.plan(1, 4000, 16, pass_tokens=size).needed_bytes for size in (4, 64, 1024)]
    assert needed == sorted(needed)
    assert needed[2] > 2 * needed[0]
    assert memory.plan(2, 4000, 16, pass_tokens=64).needed_bytes == pytest.approx(2 * needed[1], rel=1e-6)


def test_passes_are_halved_until_the_prompt_fits(make_language_model: MakeLanguageModel) -> None:
    memory = memory_model(make_language_model(context=4096, pass_tokens=96), parameters=10**7)

    def passes(free: int | None) -> tuple[int, ...]:
        return memory.plan(1, 150, 10, pass_tokens=96, free=free).passes

    everything = memory.plan(1, 150, 10, pass_tokens=96)
    assert passes(None) == passes(everything.needed_bytes) == (96, 54)
    assert passes(everything.needed_bytes - 1) == (48, 48, 48, 6)
    least = memory.plan(1, 150, 10, pass_tokens=4).needed_bytes
    assert passes(least) == (4,) * 37 + (2,)
    with pytest.raises(
        InputError, match=r"not enough memory: 150 prompt and 10 new tokens need about .* 4 tokens at a"
    ):
        passes(least - 1)


def test_a_prompt_is_read_in_shorter_passes_where_memory_is_short(
    toy: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = PROMPTS[-1]
    toy._memory = memory_model(toy.bundle, parameters=10**6)
    free = toy._memory.plan(1, len(prompt), 5, pass_tokens=8).needed_bytes
    monkeypatch.setattr(generation, "free_memory_bytes", lambda: free)
    result = toy.generate(prompt, max_new_tokens=5)
    assert max(result.statistics.passes) == 8
    assert result.statistics.needed_bytes == free
    assert list(result.tokens[0]) == following(prompt, 5)


def test_a_text_that_does_not_fit_is_refused_with_the_figures(
    untouched: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "free_memory_bytes", lambda: 1500)
    with pytest.raises(
        InputError,
        match=r"not enough memory: 2 texts of up to 16 prompt and 48 new .* 0\.0 MiB are free; shorten the prompt",
    ):
        untouched.stream(["a", "exactly sixteen!"], max_new_tokens=48)


def test_weights_that_do_not_fit_are_not_loaded(
    make_language_model: MakeLanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generation, "free_memory_bytes", lambda: 100)
    with pytest.raises(InputError, match="not enough memory: loading toy-onnx needs about"):
        load_generator(make_language_model())
    check_weights_fit("model", 10**12, None)


@pytest.mark.parametrize(
    ("smallest", "advice"), [(False, r"free memory, or export it with --precision int4"), (True, "free memory")]
)
def test_a_model_that_is_small_already_is_not_told_to_shrink(smallest: bool, advice: str) -> None:
    with pytest.raises(InputError, match=rf"12\.0 MiB, and 1\.0 MiB are free; {advice}$"):
        check_weights_fit("model", 12 * 2**20, 2**20, smallest=smallest)


def test_free_memory_is_a_plausible_figure() -> None:
    free, total = system.free_memory_bytes(), system.this_machine().memory_bytes
    assert free is None or total is None or 0 < free <= total
