"""Codes that are solved layer by layer: what reaches each matrix, starved experts, and the folder that keeps them."""

from __future__ import annotations

import dataclasses
import json
import shutil

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from flex_olmo_checkpoints import write_flex_olmo_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file

from export.calibration.layers import Solver, Wanted
from export.calibration.overlay import Overlay
from export.calibration.store import CalibrationText, solve_codes
from export.calibration.text import WINDOW_TOKENS, own_text, windows_of
from export.checkpoint.folder import open_checkpoint
from export.checkpoint.tensor_table import Role
from export.errors import CheckpointError, ConfigError, QuantizationError
from export.families import read_model
from export.files.resume import partial_path
from export.quantize.gptq import Factor, Hessian, solve, symmetric
from export.quantize.solved import open_solved, packed, row_checksums, unpacked
from export.reference.model import Reference, bounds_of, embedding_rows
from export.reference.operations import normalise
from export.reference.reader import Reader
from export.tokenizer.surplus import model_settings
from trt_build.comparison.evaluation_text import own_text as held_out_text
from trt_build.comparison.parity import log_softmax

SIZES = {"hidden_size": 64, "num_heads": 2, "rotary_dim": 16, "ffn_size": 96, "vocab_size": 320}


def phixtral(folder, **options):
    return write_phixtral_checkpoint(folder, seed=5, num_experts=3, experts_per_token=2, **{**SIZES, **options})


def mixtral(folder):
    return write_mixtral_checkpoint(folder, seed=2, spelling="published", hidden_size=64, ffn_size=96)


def flex_olmo(folder):
    return write_flex_olmo_checkpoint(folder, seed=2, hidden_size=64, num_heads=4, ffn_size=96)


def model_of(folder):
    return read_model(open_checkpoint(folder))


def wanted_of(model, bits=4, block=32, **options):
    found = {}
    for spec in model.weights.table.values():
        if spec.role in (Role.ATTENTION, Role.EXPERT, Role.HEAD):
            experts = tuple(range(spec.shape[0])) if spec.stacks_experts else (0,)
            found[spec.name] = Wanted(bits=bits, block_size=block, experts=experts, **options)
    return found


def text_of(model, tokens=256, window=64, seed=1):
    generator = np.random.default_rng(seed)
    ids = generator.integers(0, model.architecture.vocab_size, tokens).tolist()
    windows = [ids[start : start + window] for start in range(0, tokens, window)]
    return CalibrationText(windows=windows, record={"names": ["random"], "bytes": tokens, "sha256": f"{seed}"})


def solved(model, wanted, windows):
    """All codes of a model: row -> place -> codes, and row -> what was solved."""
    solver = Solver(model=model, wanted=wanted)
    state, rows = solver.begin(windows), {}
    for index in range(solver.num_layers):
        state, found = solver.layer(index, state, windows)
        rows |= found
    return {name: row.codes for name, row in rows.items()}, rows | solver.head(state)


def with_codes(model, codes):
    own = model.weights
    return dataclasses.replace(model, weights=Overlay(checkpoint=own.checkpoint, table=own.table, solved=codes))


@pytest.mark.parametrize("write", [phixtral, mixtral, flex_olmo])
def test_each_matrix_is_solved_for_what_reaches_it_from_the_codes_before(tmp_path, write):
    """Layer 0 by hand: query, key and value see the embedding; attention's output what the heads make of their codes;
    an expert its tokens alone; its second matrix what the codes of the first make of them. What is wanted of each are
    the outputs for the checkpoint's own inputs, and of those that add to the states, with no norm between, half of what
    these lack. By least squares that is another matrix, W + L^T X (H + damping)^-1, solved for the same inputs."""
    from export.reference.attention import Projections
    from export.reference.mixture import Expert, route

    model = model_of(write(tmp_path / "model"))
    wanted, windows = wanted_of(model), text_of(model).windows
    codes, rows = solved(model, wanted, windows)
    network = model.family.network(model.weights.checkpoint.config)
    layer = network.layers[0]
    state = embedding_rows(model, [token for window in windows for token in window])

    def expected(name, inputs, exact, missing, place):
        hessian = Hessian(inputs.shape[1])
        for start in range(0, len(inputs), 512):
            hessian.add(inputs[start : start + 512])
        spec = model.weights.table[name]
        weights = np.concatenate(list(model.weights.chunks(name, [place] if spec.stacks_experts else None)))
        lacking = (exact - inputs).astype(np.float64) @ weights.T + missing
        damped = inputs.T.astype(np.float64) @ inputs
        damped += np.eye(len(damped)) * np.diag(damped).mean() * max(0.01, len(damped) / len(inputs))
        better = (weights + lacking.T @ inputs @ np.linalg.inv(damped)).astype(np.float32)
        return solve(name, better, hessian.factor(name), 32, 4, symmetric(4)).codes

    def equal(name, inputs, exact, missing=0, place=0):
        assert (codes[name][place].codes == expected(name, inputs, exact, missing, place)).mean() > 0.998, name

    inputs = exact = normalise(state, layer.norm, model.weights)
    for module in layer.attention.inputs:
        equal(f"{module}.weight", inputs, exact)
    projections, exact_ones = (
        Projections(layer.attention, Reader(weights)) for weights in (with_codes(model, codes).weights, model.weights)
    )
    heads, exact_heads = (one.heads(inputs, bounds_of(windows)) for one in (projections, exact_ones))
    equal(f"{layer.attention.output}.weight", heads, exact_heads)
    attended = [projections.output(heads), exact_ones.output(exact_heads)]
    state, exact_state = (state + normalise(one, layer.attention_output_norm, model.weights) for one in attended)
    missing = (exact_state - state) * (0 if layer.mlp_output_norm else 0.5)
    if not layer.parallel:
        inputs, exact = (normalise(one, layer.mlp_norm, model.weights) for one in (state, exact_state))
    logits = inputs @ model.weights.load(f"{layer.mlp.gate}.weight").T
    chosen, _ = route(logits, layer.mlp.router, 2)
    for expert in range(logits.shape[1]):
        here = (chosen == expert).any(axis=1)
        assert rows[f"{layer.mlp.first}.weight"].tokens[expert] == here.sum()
        equal(f"{layer.mlp.first}.weight", inputs[here], exact[here], place=expert)
        inner = Expert(layer.mlp, Reader(with_codes(model, codes).weights), expert).inner(inputs[here])
        exact_inner = Expert(layer.mlp, Reader(model.weights), expert).inner(exact[here])
        equal(f"{layer.mlp.second}.weight", inner, exact_inner, missing[here], expert)


def test_the_codes_serve_better_than_others_on_other_text(trained_phixtral, monkeypatch):
    """Mean KL of the trained example on held-out text, over 4,096 tokens of the calibration text: better than searched
    ones, and than those of matrices that mend nothing of the errors before them."""
    model = model_of(trained_phixtral)
    tokenizer = model_settings(model).tokenizer
    windows = windows_of(tokenizer.encode_prompt(own_text()), 4096, 512, "")
    wanted = {name: one for name, one in wanted_of(model, block=64).items() if "lm_head" not in name}
    ids = tokenizer.encode_prompt(held_out_text().content)[:1024]
    held_out = [ids[:512], ids[512:]]
    searched = {}
    for name in wanted:
        spec, weights = model.weights.table[name], model.weights.load(name)
        matrices = weights if spec.stacks_experts else weights[None]
        searched[name] = {
            place: solve(name, matrix, None, 64, 4, symmetric(4)) for place, matrix in enumerate(matrices)
        }
    exact = [log_softmax(logits) for logits, _ in Reference(model).run(held_out)]

    def divergence(codes):
        found = [log_softmax(logits) for logits, _ in Reference(with_codes(model, codes)).run(held_out)]
        return np.mean([(np.exp(p) * (p - q)).sum(-1).mean() for p, q in zip(exact, found, strict=True)])

    found = divergence(solved(model, wanted, windows)[0])
    assert found < 0.6 * divergence(searched)
    monkeypatch.setattr(Factor, "shares", lambda self, lacking: np.zeros_like(lacking))
    plain = divergence(solved(model, wanted, windows)[0])
    assert found < 0.9 * plain


def test_a_matrix_mends_errors_of_its_own_size_alone(tmp_path):
    """A head of 8 bits behind matrices of 2 would be ten times as far from the checkpoint's as its bits make it, which
    `moeship verify` takes for other weights (trt_build/comparison/limits.py: 5 * 2^-bits)."""
    model = model_of(phixtral(tmp_path / "model"))
    wanted = {
        name: dataclasses.replace(one, bits=8) if "lm_head" in name else one
        for name, one in wanted_of(model, bits=2).items()
    }
    _, rows = solved(model, wanted, text_of(model).windows)
    head, values = model.weights.load("lm_head.linear.weight"), rows["lm_head.linear.weight"].codes[0].values()
    assert np.linalg.norm(head - values) <= 4 * 2**-8 * np.linalg.norm(head)
    assert (np.abs(head - values) > 2**-8 * np.abs(head).max()).any()  # and yet it mends something


def test_an_expert_that_too_few_tokens_choose_falls_back(tmp_path):
    """A window of 2 tokens, where a 32nd of 96 input features is 3."""
    model = model_of(phixtral(tmp_path / "model"))
    codes, rows = solved(model, wanted_of(model), text_of(model, tokens=2, window=2).windows)
    second = "transformer.h.0.moe.mlp.fc2.weight"
    assert rows[second].fallen_back == (0, 1, 2)
    matrix = model.weights.load(second)[1]
    assert (codes[second][1].codes == solve(second, matrix, None, 32, 4, symmetric(4)).codes).all()
    assert rows["transformer.h.0.mixer.Wqkv.weight"].fallen_back == ()  # a 32nd of 64 is 2


def test_an_expert_that_only_zeros_reach_falls_back(tmp_path):
    """The first matrix of an expert and its bias are zeros, and so is GELU of them."""
    folder = phixtral(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    for kind in ("weight", "bias"):
        tensors[f"transformer.h.0.moe.mlp.1.fc1.{kind}"][:] = 0
    save_file(tensors, folder / "model.safetensors")
    model = model_of(folder)
    codes, rows = solved(model, wanted_of(model), text_of(model).windows)
    second = "transformer.h.0.moe.mlp.fc2.weight"
    assert rows[second].fallen_back == (1,)
    matrix = model.weights.load(second)[1]
    assert (codes[second][1].codes == solve(second, matrix, None, 32, 4, symmetric(4)).codes).all()


def test_experts_that_are_not_wanted_are_not_solved(tmp_path):
    model = model_of(phixtral(tmp_path / "model"))
    wanted = {
        name: dataclasses.replace(one, experts=(0, 2)) if len(one.experts) > 1 else one
        for name, one in wanted_of(model).items()
    }
    folder = solve_codes(tmp_path / "codes", model, wanted, text_of(model))
    matrix = folder.matrices["transformer.h.1.moe.mlp.fc1.weight"]
    assert matrix.tokens[1] == 0
    assert set(matrix.checksums) == {"0.0", "2.0"}


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_codes_are_packed_as_a_stream_of_bits(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 64)).astype(np.uint8)
    assert packed(codes, bits).shape == (3, 5, 8 * bits)
    assert (unpacked(packed(codes, bits), bits) == codes).all()
    if bits == 4:
        assert (packed(codes, 4) == (codes[..., ::2] | codes[..., 1::2] << 4)).all()


def test_checksums_see_places_and_values_and_not_the_sign_of_zero():
    values = np.random.default_rng(1).standard_normal((6, 4)).astype(np.float32)
    values[2, 1] = 0
    whole = row_checksums(values, 0)
    assert whole == row_checksums(values[:4], 0) + row_checksums(values[4:], 4)
    negative = values.copy()
    negative[2, 1] = -0.0
    assert row_checksums(negative, 0) == whole
    other = values.copy()
    other[[0, 1]] = other[[1, 0]]
    assert row_checksums(other, 0) != whole


class StoppedError(Exception):
    """In the middle of a run."""


@pytest.mark.parametrize("symmetric_grids", [True, False])
def test_an_interrupted_run_goes_on_to_the_same_bytes(tmp_path, monkeypatch, symmetric_grids):
    model = model_of(phixtral(tmp_path / "model"))
    wanted, text = wanted_of(model, bits=3, symmetric=symmetric_grids), text_of(model)
    whole = solve_codes(tmp_path / "whole", model, wanted, text)
    layer = Solver.layer

    def stop_at_last(self, index, state, windows):
        if index == self.num_layers - 1:
            raise StoppedError
        return layer(self, index, state, windows)

    monkeypatch.setattr(Solver, "layer", stop_at_last)
    with pytest.raises(StoppedError):
        solve_codes(tmp_path / "again", model, wanted, text)
    assert not (tmp_path / "again").exists()
    assert len(list((partial_path(tmp_path / "again") / "content").glob("*.npy"))) == 1
    indices = []
    monkeypatch.setattr(Solver, "layer", lambda self, index, *rest: indices.append(index) or layer(self, index, *rest))
    again = solve_codes(tmp_path / "again", model, wanted, text)
    assert indices == [model.architecture.num_layers - 1]
    names = sorted(path.name for path in whole.folder.iterdir())
    assert names == sorted(path.name for path in again.folder.iterdir())
    assert [(whole.folder / name).read_bytes() == (again.folder / name).read_bytes() for name in names] == [True] * len(
        names
    )
    assert not partial_path(again.folder).exists()


def test_a_damaged_layer_of_an_interrupted_run_is_solved_again(tmp_path, monkeypatch):
    model = model_of(phixtral(tmp_path / "model"))
    wanted, text = wanted_of(model), text_of(model)
    whole = solve_codes(tmp_path / "whole", model, wanted, text)
    monkeypatch.setattr(Solver, "head", lambda self, state: (_ for _ in ()).throw(StoppedError))
    with pytest.raises(StoppedError):
        solve_codes(tmp_path / "again", model, wanted, text)
    monkeypatch.undo()
    damaged = partial_path(tmp_path / "again") / "content" / "layer-0000.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    again = solve_codes(tmp_path / "again", model, wanted, text)
    assert again.digest == whole.digest


def test_codes_that_are_there_are_taken_if_they_fit(tmp_path):
    model = model_of(phixtral(tmp_path / "model"))
    wanted, text = wanted_of(model), text_of(model)
    first = solve_codes(tmp_path / "codes", model, wanted, text)
    assert solve_codes(tmp_path / "codes", model, wanted, text) == first
    with pytest.raises(ConfigError, match="solved otherwise; name another folder with --codes"):
        solve_codes(tmp_path / "codes", model, wanted, text_of(model, seed=2))
    with pytest.raises(ConfigError, match="matrices: found"):
        solve_codes(tmp_path / "codes", model, wanted_of(model, bits=3), text)
    other = shutil.copytree(tmp_path / "model", tmp_path / "other")
    phixtral(tmp_path / "third", ffn_size=96)
    (other / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="model.safetensors is not the file that they were solved from"):
        solve_codes(tmp_path / "codes", model_of(other), wanted, text)
    path = tmp_path / "codes" / "layer-0001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(ConfigError, match="layer-0001.safetensors is not as it was written"):
        open_solved(tmp_path / "codes")
    path.unlink()
    with pytest.raises(ConfigError, match="layer-0001.safetensors is not as it was written"):
        open_solved(tmp_path / "codes")
    listing = json.loads((tmp_path / "codes/codes.json").read_text())
    fewer = dict(list(listing["matrices"].items())[1:])  # whose codes would be searched
    (tmp_path / "codes/codes.json").write_text(json.dumps({**listing, "matrices": fewer}))
    with pytest.raises(ConfigError, match="codes.json is not as it was written"):
        open_solved(tmp_path / "codes")
    (tmp_path / "codes/codes.json").write_text(json.dumps({**listing, "format_version": 9}))
    with pytest.raises(ConfigError, match="they have format 9, expected 1"):
        open_solved(tmp_path / "codes")


def test_the_own_text_has_many_kinds_in_any_part_of_it():
    text = own_text()
    assert 20_000 < len(text.encode()) < 100_000
    for part in (text[: len(text) // 3], text):
        for sign in ("import ", "#include", "#!/", "ä", "é", "ы", "的", "の"):
            assert sign in part, sign
    kept_apart = {line for line in text.splitlines() if len(line) > 40} & set(held_out_text().content.splitlines())
    assert not kept_apart


def test_a_text_that_does_not_fill_a_window_is_refused():
    assert [len(window) for window in windows_of(range(1100), 8192, 2048, "t")] == [WINDOW_TOKENS] * 2
    assert [len(window) for window in windows_of(range(1100), 300, 128, "t")] == [128, 128]
    with pytest.raises(
        ConfigError, match="calibrating on t: it has 100 tokens, expected at least 512, a window of text"
    ):
        windows_of(range(100), 8192, 2048, "t")
    with pytest.raises(ConfigError, match="asked for 100 tokens, expected at least 512"):
        windows_of(range(1100), 100, 2048, "t")


def test_tokens_of_another_tokenizer_are_refused(tmp_path):
    model = model_of(phixtral(tmp_path / "model"))
    with pytest.raises(CheckpointError, match="the text holds token 999, the embedding has 320 rows; the tokenizer is"):
        solved(model, wanted_of(model), [[1, 999]])


def test_activations_beyond_float32_are_named(tmp_path):
    model = model_of(phixtral(tmp_path / "model"))
    solver = Solver(model=model, wanted=wanted_of(model))
    windows = text_of(model).windows
    state = solver.begin(windows)
    state[0, 3] = np.nan
    beyond = pytest.raises(QuantizationError, match=r"transformer.h.0.mixer.Wqkv.weight by GPTQ: .* beyond float32")
    with np.errstate(invalid="ignore"), beyond:
        solver.layer(0, state, windows)
