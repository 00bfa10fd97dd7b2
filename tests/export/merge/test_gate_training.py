"""Gates fitted to texts: the fit against torch's, the targets and figures by hand, and what a merge writes of it."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from checkpoints import write_phi_checkpoint
from safetensors.numpy import load_file
from torch_reference import load_reference, run_model

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.errors import MergeError
from export.families import read_model
from export.merge.config import read_merge_config
from export.merge.gate_training import NEIGHBOURS, GateTraining, TrainingText, _targets, token_losses
from export.merge.logistic import fit_rows
from export.merge.merge import TRAINING_FILE, merge

EXPERTS = Path(__file__).parents[3] / "examples/tiny-phixtral/experts"
PLAIN = "The second argument says how the file is opened, and whether what it holds is text. {} names are looked up.\n"
CODE = "    def read_{0}(self, size=-1):\n        if self.closed:\n            raise ValueError({0})\n"


def text_of(line, count):
    return "".join(line.format(number * 37 % 101) for number in range(count))


@pytest.fixture(scope="module")
def texts():
    return (
        TrainingText(name="plain.txt", content=text_of(PLAIN, 60)),
        TrainingText(name="code.txt", content=text_of(CODE, 80)),
    )


def write_yaml(folder, *models, k=2, **keys):
    experts = [{"source_model": str(model), "positive_prompts": [""]} for model in models]
    values = {"base_model": str(models[0]), "gate_mode": "cheap_embed", "experts_per_token": k, "experts": experts}
    (folder / "merge.yml").write_text(yaml.safe_dump(values | keys))
    return read_merge_config(folder / "merge.yml")


@pytest.fixture(scope="module")
def merged(tmp_path_factory, texts):
    """Two trained experts whose gate rows are equal before, one expert a token."""
    folder = tmp_path_factory.mktemp("trained")
    config = write_yaml(folder, EXPERTS / "code", EXPERTS / "prose", k=1)
    return merge(config, folder / "out", training=GateTraining(texts=texts, tokens=1280))


def test_the_fit_is_that_of_torch_on_the_same_loss():
    random = np.random.default_rng(4)
    x = random.standard_normal((400, 12)).astype(np.float32) * 3
    targets = torch.softmax(torch.from_numpy(x[:, :3] @ random.standard_normal((3, 3))), dim=1).double()
    fit = fit_rows(x, targets.numpy(), penalty=0.01, most_steps=300)
    scale = math.sqrt(np.square(x.astype(np.float64)).mean())
    inputs = torch.from_numpy(x).double() / scale
    rows = torch.zeros(3, 12, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([rows], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        own = -(targets * torch.log_softmax(inputs @ rows.T, dim=1)).sum(dim=1).mean()
        value = own + 0.005 * (rows**2).sum()
        value.backward()
        return value

    optimizer.step(loss)
    np.testing.assert_allclose(fit.rows * scale, rows.detach().numpy(), atol=0.01)
    expected = -(targets * torch.log_softmax(inputs @ rows.T, dim=1)).sum(dim=1).mean()
    assert fit.loss == pytest.approx(expected.item(), abs=1e-4)
    assert 1 < fit.steps < 300


def test_the_steps_of_a_fit_are_bounded():
    x = np.random.default_rng(4).standard_normal((50, 8)).astype(np.float32)
    targets = np.eye(2)[(x[:, 0] > 0).astype(int)]
    assert fit_rows(x, targets, penalty=0.0, most_steps=3).steps == 3


def test_targets_are_the_posterior_of_the_stretch_around_a_token():
    losses = np.random.default_rng(1).uniform(0, 0.2, (100, 3))
    losses[-1] = np.nan  # the last token of a window predicts nothing that is known
    targets = _targets(losses)
    for place in (0, 10, 50, 99):
        around = losses[max(0, place - NEIGHBOURS) : place + NEIGHBOURS + 1]
        chances = np.exp(-np.nansum(around, axis=0))
        np.testing.assert_allclose(targets[place], chances / chances.sum(), rtol=1e-9)


def test_losses_are_those_of_transformers():
    model = read_model(open_checkpoint(str(EXPERTS / "prose")))
    window = np.random.default_rng(2).integers(0, 2048, 70).tolist()
    [losses] = token_losses(model, [window], lambda _: None)
    logits = torch.from_numpy(run_model(load_reference(model), window)[0])
    expected = torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(window[1:]), reduction="none")
    np.testing.assert_allclose(losses[:-1], expected.numpy(), rtol=1e-4)
    assert math.isnan(losses[-1])


def test_each_text_goes_to_its_expert(merged):
    rows = merged.trained.perplexities
    code, prose = rows["expert 0, code"], rows["expert 1, prose"]
    before, after = rows["mixture, gates untrained"], rows["mixture, gates trained"]
    assert prose[0] < code[0]
    assert code[1] < prose[1]
    assert before == pytest.approx(code)  # equal rows: the first expert takes every token
    assert after[2] < min(code[2], prose[2], before[2])
    assert after[2] == pytest.approx(math.sqrt(prose[0] * code[1]), rel=0.05)  # both texts have as many tokens


def test_the_trained_gates_are_what_the_checkpoint_holds(merged, texts):
    stored = load_file(merged.folder / "model.safetensors")
    for layer, gate in merged.trained.gates.items():
        np.testing.assert_array_equal(stored[f"transformer.h.{layer}.moe.gate.weight"], gate.astype(np.float16))
    assert not any(layer.duplicate_groups for layer in merged.routing.layers)
    model = read_model(open_checkpoint(str(merged.folder)))
    held_out = [window for windows in merged.trained.held_out for window in windows]
    losses = np.concatenate(token_losses(model, held_out, lambda _: None))
    assert merged.trained.perplexities["mixture, gates trained"][-1] == pytest.approx(np.exp(np.nanmean(losses)))


def test_nothing_but_the_gates_is_another(merged, tmp_path):
    config = write_yaml(tmp_path, EXPERTS / "code", EXPERTS / "prose", k=1)
    plain = load_file(merge(config, tmp_path / "plain").folder / "model.safetensors")
    trained = load_file(merged.folder / "model.safetensors")
    assert plain.keys() == trained.keys()
    differing = [name for name in plain if plain[name].tobytes() != trained[name].tobytes()]
    assert differing == [f"transformer.h.{layer}.moe.gate.weight" for layer in range(4)]


def test_the_folder_says_how_its_gates_were_made(merged, texts):
    record = json.loads((merged.folder / TRAINING_FILE).read_text())
    assert [text["name"] for text in record["texts"]] == ["plain.txt", "code.txt"]
    assert all(text["training_tokens"] == 1024 and text["held_out_tokens"] == 256 for text in record["texts"])
    assert record["held_out_perplexity"].keys() == merged.trained.perplexities.keys()
    assert len(record["layers"]) == 4
    assert sum(record["best_expert"]) == pytest.approx(1)


def test_gates_that_are_worse_than_before_are_told(merged, texts, tmp_path, monkeypatch, caplog):
    assert merged.trained.finding is None

    def worse(trained, *_):
        before = trained.perplexities["mixture, gates untrained"]
        after = {"mixture, gates trained": (*before[:-1], before[-1] + 1)}
        return dataclasses.replace(trained, perplexities={**trained.perplexities, **after})

    monkeypatch.setattr("export.merge.merge.measured_after", worse)
    config = write_yaml(tmp_path, EXPERTS / "code", EXPERTS / "prose", k=1)
    merge(config, tmp_path / "worse", training=GateTraining(texts=texts, tokens=640))
    assert "no better than the gates before them: perplexity" in caplog.text
    assert "from 1024 tokens; take more tokens or other texts" in caplog.text


def test_training_again_gives_the_same_bytes_and_another_seed_holds_out_another_part(merged, texts, tmp_path):
    config = write_yaml(tmp_path, EXPERTS / "code", EXPERTS / "prose", k=1)
    training = GateTraining(texts=texts, tokens=1280)
    again = merge(config, tmp_path / "again", training=training)
    assert (again.folder / "model.safetensors").read_bytes() == (merged.folder / "model.safetensors").read_bytes()
    other = merge(config, tmp_path / "other", training=training, seed=1)
    assert other.trained.held_out != merged.trained.held_out
    assert (other.folder / "model.safetensors").read_bytes() != (merged.folder / "model.safetensors").read_bytes()


def test_an_expert_that_is_never_best_is_named_and_gets_no_tokens(tmp_path, texts, caplog):
    sizes = {"hidden_size": 192, "num_heads": 6, "ffn_size": 768, "num_layers": 4, "max_positions": 512}
    random = write_phi_checkpoint(tmp_path / "random", seed=1, vocab_size=2048, rotary_dim=16, **sizes)
    config = write_yaml(tmp_path, EXPERTS / "code", random, k=1, dtype="float16")
    result = merge(config, tmp_path / "out", training=GateTraining(texts=texts, tokens=640))
    assert "expert(s) 1 are best for no token of the texts" in caplog.text
    rows = result.trained.perplexities
    assert rows["mixture, gates trained"] == pytest.approx(rows["expert 0, code"], rel=1e-6)


def test_a_text_without_room_for_a_held_out_part_is_refused(tmp_path, texts):
    config = write_yaml(tmp_path, EXPERTS / "code", EXPERTS / "prose")
    short = TrainingText(name="short.txt", content=text_of(PLAIN, 4))
    for training, message in (
        (
            GateTraining(texts=(texts[0], short)),
            r"training gates on short.txt: it has \d+ tokens, expected at least 320",
        ),
        (GateTraining(texts=texts, tokens=100), "100 of them are taken, expected at least 320: 5 windows of 64"),
    ):
        with pytest.raises(MergeError, match=message):
            merge(config, tmp_path / "out", training=training)
        assert [path.name for path in tmp_path.iterdir()] == ["merge.yml"]


def test_the_command_prints_the_table(tmp_path, texts, capsys):
    write_yaml(tmp_path, EXPERTS / "code", EXPERTS / "prose", k=1)
    paths = []
    for text in texts:
        paths.append(tmp_path / text.name)
        paths[-1].write_text(text.content)
    words = [str(tmp_path / "merge.yml"), str(tmp_path / "out"), "--train-gates", *map(str, paths)]
    assert main(["merge", *words, "--train-tokens", "640"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["held-out", "perplexity", "plain.txt", "code.txt", "all"]
    assert [line.rpartition("  ")[0].strip().split("  ")[0] for line in lines[2:]] == [
        "expert 0, code", "expert 1, prose", "mixture, gates untrained", "mixture, gates trained",
    ]  # fmt: skip


def test_tokens_without_texts_and_texts_that_are_none_are_refused(tmp_path, capsys):
    write_yaml(tmp_path, EXPERTS / "code", EXPERTS / "prose")
    words = ["merge", str(tmp_path / "merge.yml"), str(tmp_path / "out")]
    assert main([*words, "--train-tokens", "640"]) == 2
    assert "--train-tokens belongs to --train-gates" in capsys.readouterr().err
    assert main([*words, "--train-gates", str(tmp_path / "absent.txt")]) == 2
    assert "absent.txt" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*words, "--train-gates", "x", "--train-tokens", "0"])
