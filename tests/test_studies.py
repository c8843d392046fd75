"""The studies: measures by hand, the sequence-level loss against autograd, pages that show the results, quick runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))

import measures
import moe_balance
import repetition
import smollm2

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"<!-- (moe|repetition) -->\n(.*?)<!-- /\1 -->", re.DOTALL)
TABLES = {"moe": ("moe_balance", moe_balance.table), "repetition": ("repetition", repetition.table)}


def test_measures_by_hand():
    assert measures.seq_rep([1, 2, 3, 4], 2) == 0
    assert measures.seq_rep([1, 2, 1, 2, 1, 2], 2) == pytest.approx(0.6)
    assert measures.seq_rep([1], 4) == 0
    assert measures.distinct([[1, 2], [1, 2], [1, 3]], 2) == pytest.approx(2 / 3)
    assert measures.longest_loop([7, 1, 2, 1, 2, 1, 2]) == (6, True)
    assert measures.longest_loop([1, 2, 1, 2, 1, 2, 9]) == (6, False)
    assert measures.longest_loop([1, 2, 1, 2, 9, 8, 7]) == (0, False)  # twice is no loop
    assert measures.longest_loop([5, 5, 5]) == (3, True)
    assert measures.repeated_positions([1, 2, 3, 1, 2, 4], 2) == [False, False, False, True, True, False]
    found = measures.measures([[1, 2, 3, 4, 5, 6], [9, 9, 9, 9, 9, 9]])
    assert found["ends_in_loop"] == 0.5 and found["longest_loop"] == 3.0
    assert found["seq_rep_1"] == pytest.approx((0 + 5 / 6) / 2)


class Tiny(nn.Module):
    """As much of a Hugging Face model as the study asks for: the next token follows from the last alone."""

    def __init__(self, vocab_size=12, width=8):
        super().__init__()
        self.embedding, self.lm_head = nn.Embedding(vocab_size, width), nn.Linear(width, vocab_size, bias=False)
        self.model = lambda input_ids, use_cache: SimpleNamespace(last_hidden_state=self.embedding(input_ids))

    def forward(self, input_ids, past_key_values=None, use_cache=True, logits_to_keep=1):
        return SimpleNamespace(
            past_key_values=None, logits=self.lm_head(self.embedding(input_ids))[:, -logits_to_keep:]
        )


def test_sequence_loss_is_unlikelihood_of_what_repeats():
    torch.manual_seed(0)
    model, prefixes = Tiny(), torch.randint(12, (3, 5))
    setting = repetition.Setting(rollout_length=20, rollout_ngram=2)
    loss, share = repetition.sequence_loss(model, prefixes, setting)
    rollout = smollm2.continuations(model, prefixes, 20)
    read = torch.cat([prefixes, rollout], 1)[:, 4:-1]  # what each token of the rollout follows
    log_probs = (
        model.lm_head(model.embedding(read)).double().log_softmax(-1).gather(-1, rollout.unsqueeze(-1)).squeeze(-1)
    )
    repeated = torch.tensor([measures.repeated_positions(tokens, 2) for tokens in rollout.tolist()])
    expected = -torch.log1p(-log_probs[repeated].exp()).mean()
    assert 0.3 < share < 1 and share == pytest.approx(float(repeated.float().mean()))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    gradients = [torch.autograd.grad(value, list(model.parameters()), retain_graph=True) for value in (loss, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-6)


def test_continuations_are_the_most_probable_and_sampling_repeats_with_its_seed():
    torch.manual_seed(0)
    model, prefixes = Tiny(), torch.randint(12, (2, 3))
    greedy = smollm2.continuations(model, prefixes, 4)
    expected = model.lm_head(model.embedding(torch.cat([prefixes[:, -1:], greedy[:, :-1]], 1))).argmax(-1)
    assert torch.equal(greedy, expected)
    sampled = [smollm2.continuations(model, prefixes, 30, sample=True, seed=seed) for seed in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


class Interrupted(Exception):
    pass


def test_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """A stopped run that goes on gives what a run in one piece gives: weights, optimizer and data are the same."""

    def load(cache, n_trained_layers):
        torch.manual_seed(0)
        model = Tiny()
        model.lm_head.requires_grad_(False)
        return model, SimpleNamespace(decode=str)

    streams = torch.randint(12, (3, 400), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(smollm2, "missing_packages", list)
    monkeypatch.setattr(smollm2, "load", load)
    monkeypatch.setattr(repetition, "texts", lambda tokenizer, limit: repetition.Texts(*streams))

    def study(name, stop_at=None):
        sizes = "--updates 24 --batch-size 2 --n-tokens 12 --prefix-length 4 --rollout-length 9 --rollout-ngram 2"
        sizes += " --n-prompts 3 --n-new-tokens 8 --n-windows 2 --seeds 1 --arms both"
        files = ["--output", str(tmp_path / f"{name}.json"), "--cache", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["repetition.py", *sizes.split(), *files])
        calls = []

        def windows(*arguments, **named):
            calls.append(arguments)
            if len(calls) == stop_at:
                raise Interrupted
            return make_windows(*arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(repetition, "windows", windows)
            repetition.main()
        return json.loads((tmp_path / f"{name}.json").read_text())

    make_windows = repetition.windows
    whole = study("whole")
    with pytest.raises(Interrupted):
        study("stopped", stop_at=26)  # the state of update 20 is on the disk
    assert len(list((tmp_path / "stopped").glob("*.pt"))) == 1
    again = study("stopped")
    assert again["arms"] == whole["arms"] and again["before"] == whole["before"]
    assert len(whole["arms"]["both"]["0"]["history"]) == 24
    assert not list((tmp_path / "stopped").glob("*.pt"))
    assert "| both | 1 |" in capsys.readouterr().out


@pytest.mark.parametrize("name", TABLES)
def test_pages_show_the_results(name):
    stem, table = TABLES[name]
    results = ROOT / "studies" / "results" / f"{stem}.json"
    shown = {mark: text for mark, text in MARKED.findall((ROOT / "docs" / "studies" / f"{stem}.md").read_text())}
    if results.exists():
        assert shown[name] == "\n" + table(json.loads(results.read_text())) + "\n"
    else:
        assert name not in shown, "a page shows numbers, and there are no results"


def run(script, *arguments):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(ROOT / "studies" / script), *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result


def test_quick_run_of_the_experts(tmp_path):
    pytest.importorskip("tokenizers", reason="the text needs the extra [examples]")
    printed = run("moe_balance.py", "--quick", "--output", tmp_path / "moe.json").stdout
    results = json.loads((tmp_path / "moe.json").read_text())
    assert printed == moe_balance.table(results)
    assert set(results["arms"]) == {"none", "Switch", "steering + bias"}
    none, switch = (results["arms"][name]["0"] for name in ("none", "Switch"))
    assert none["loss"][0] == pytest.approx(switch["loss"][0])  # the same weights and data
    assert none["loss"][-1] < none["loss"][0]


@pytest.mark.skipif(
    bool(smollm2.missing_packages()), reason=f"`make study` installs {', '.join(smollm2.missing_packages())}"
)
def test_quick_run_of_the_real_model(tmp_path):
    run("repetition.py", "--quick", "--output", tmp_path / "repetition.json", "--cache", tmp_path / "cache")
    results = json.loads((tmp_path / "repetition.json").read_text())
    assert set(results["arms"]) == {"cross-entropy", "sequence"}
    history = results["arms"]["sequence"]["0"]["history"]
    assert ["sequence_loss" in line for line in history] == [False, True, False, True]
    assert results["before"]["same_kind"]["perplexity"] > 1
    # goes on where it stopped: nothing is left to do
    before = (tmp_path / "repetition.json").stat().st_mtime_ns
    run("repetition.py", "--quick", "--output", tmp_path / "repetition.json", "--cache", tmp_path / "cache")
    assert (tmp_path / "repetition.json").stat().st_mtime_ns == before


if __name__ == "__main__":
    for stem, table in TABLES.values():
        page, results = ROOT / "docs" / "studies" / f"{stem}.md", ROOT / "studies" / "results" / f"{stem}.json"
        if results.exists():
            text = table(json.loads(results.read_text()))
            page.write_text(MARKED.sub(lambda m, t=text: f"<!-- {m[1]} -->\n\n{t}\n<!-- /{m[1]} -->", page.read_text()))
