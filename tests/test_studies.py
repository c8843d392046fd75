"""The studies: measures by hand, the sequence-level loss against autograd, pages that show the results, quick runs."""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support.new_python import run_python
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "studies"))

import demo
import measures
import moe_balance
import repetition
import smollm2

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"<!-- ([a-z-]+) -->\n(.*?)<!-- /\1 -->", re.DOTALL)
STUDIES = ROOT / "docs" / "studies"
# mark -> page, results, what it shows of them
SHOWN = {
    "moe": (STUDIES / "moe_balance.md", "moe_balance", moe_balance.table),
    "repetition": (STUDIES / "repetition.md", "repetition", repetition.table),
    "other": (STUDIES / "repetition.md", "repetition", repetition.other_table),
    "validation": (STUDIES / "repetition.md", "repetition", repetition.validation_table),
    "rollouts": (STUDIES / "repetition.md", "repetition", repetition.rollout_table),
    "readings": (STUDIES / "repetition.md", "repetition", repetition.readings),
    "real-model": (ROOT / "README.md", "repetition", repetition.short_table),
}


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


def tiny_model(n_trained_layers=1, seed=0):
    torch.manual_seed(seed)
    sizes = smollm2.Sizes(40, 24, 32, 3, 4, 2, 1e-5, 10000.0)
    model = smollm2.SmolLM2(sizes, n_trained_layers, torch.float32)
    for name, value in model.named_parameters():  # so that it does not say the same for every text
        nn.init.normal_(value, mean=float("norm" in name), std=0.3)
    return model


def test_model_is_the_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        initializer_range=0.3,
        attn_implementation="eager",
    )
    theirs = transformers.LlamaForCausalLM(config).eval()
    model = smollm2.from_llama(theirs.state_dict(), config, n_trained_layers=1, dtype=torch.float32)
    ids = torch.randint(40, (3, 9))
    logits = model.hidden_states(model.frozen_states(ids)) @ model.head.T
    torch.testing.assert_close(logits, theirs(ids).logits, rtol=1e-4, atol=1e-4)
    logits.square().sum().backward()
    theirs(ids).logits.square().sum().backward()
    down = theirs.model.layers[2].mlp.down_proj.weight.grad
    torch.testing.assert_close(model.layers[2].down.weight.grad, down, rtol=1e-3, atol=1e-3)
    assert all(value.requires_grad == name.startswith(("layers.2", "norm")) for name, value in model.named_parameters())


def test_continuations_are_what_the_model_without_a_cache_says():
    model, prefixes = tiny_model(), torch.randint(40, (2, 5))
    written = smollm2.continuations(model, prefixes, 8)
    read = torch.cat([prefixes, written.tokens[:, :-1]], dim=1)
    torch.testing.assert_close(written.frozen_states, model.frozen_states(read), rtol=1e-4, atol=1e-5)
    states = model.hidden_states(written.frozen_states)[:, 4:]
    assert torch.equal(written.tokens, (states @ model.head.T).argmax(-1))
    sampled = [smollm2.continuations(model, prefixes, 30, sample=True, seed=seed).tokens for seed in (1, 1, 2)]
    assert torch.equal(sampled[0], sampled[1]) and not torch.equal(sampled[0], sampled[2])


def test_sequence_loss_is_unlikelihood_of_what_repeats_over_all_that_was_written():
    model, prefixes = tiny_model(), torch.randint(40, (3, 5))
    written = smollm2.continuations(model, prefixes, 20)
    repeated = torch.tensor([measures.repeated_positions(tokens, 2) for tokens in written.tokens.tolist()])
    loss, share = repetition.sequence_loss(model, written, ngram_size=2)
    logits = (model.hidden_states(written.frozen_states)[:, 4:] @ model.head.T).double()
    log_probs = logits.log_softmax(-1).gather(-1, written.tokens.unsqueeze(-1)).squeeze(-1)
    expected = -torch.log1p(-log_probs.exp())[repeated].sum() / written.tokens.numel()
    assert 0.2 < share < 1 and share == pytest.approx(float(repeated.float().mean()))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=0)
    trained = [value for value in model.parameters() if value.requires_grad]
    gradients = [torch.autograd.grad(value, trained, retain_graph=True) for value in (loss, expected)]
    for actual, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-3, atol=1e-5)


def test_windows_keep_what_the_frozen_layers_made(tmp_path, monkeypatch):
    model, documents = tiny_model(), [torch.arange(31) % 40, torch.arange(10), torch.arange(20, 32)]
    windows = repetition.Windows(model, documents, 10, tmp_path / "states")
    chosen = torch.tensor([2, 0, 3])
    states, targets = windows[chosen]
    assert len(windows) == 4  # the second document is too short: no window reaches from one into the next
    assert targets.tolist() == [list(range(21, 31)), list(range(1, 11)), list(range(21, 31))]
    inputs = torch.stack([documents[0][20:30], documents[0][:10], documents[2][:10]])
    torch.testing.assert_close(states, model.frozen_states(inputs))
    monkeypatch.setattr(model, "frozen_states", None)  # what is in the file is not computed again
    again, _ = repetition.Windows(model, documents, 10, tmp_path / "states")[chosen]
    assert torch.equal(again, states)


def test_passages_lie_within_one_document_and_come_from_everywhere():
    documents = [torch.arange(0, 6), torch.arange(100, 103), torch.arange(200, 204)]
    found = repetition.passages(documents, 4, 200, seed=0)
    assert torch.equal(found, found[:, :1] + torch.arange(4))
    assert set(found[:, 0].tolist()) == {0, 1, 2, 200}  # every place, and none in the document that is too short
    assert torch.equal(found, repetition.passages(documents, 4, 200, seed=0))
    assert not torch.equal(found, repetition.passages(documents, 4, 200, seed=1))


def test_copies_of_documents_are_left_out():
    words = [f"word{number}" for number in range(40)]
    first, copy, other = " ".join(words), " ".join([*words[2:], "and", "more"]), " ".join(words[::-1])
    assert repetition.without_copies([first, copy, other, first]) == [first, other]


class Interrupted(Exception):
    pass


def test_study_goes_on_where_it_stopped(tmp_path, monkeypatch, capsys):
    """A stopped run that goes on gives what a run in one piece gives: weights, optimizer and data are the same."""
    both = "token and sequence, n = 2"
    monkeypatch.setitem(repetition.ARMS, both, repetition.Arm(repetition.TOKEN, 2))
    documents = torch.randint(40, (4, 2, 200), generator=torch.Generator().manual_seed(3))
    monkeypatch.setattr(smollm2, "missing_packages", list)
    monkeypatch.setattr(smollm2, "load", lambda cache, n: (tiny_model(n), SimpleNamespace(decode=str)))
    monkeypatch.setattr(repetition, "texts", lambda tokenizer, limit: repetition.Texts(*map(list, documents)))

    def study(name, arm=both, stop_at=None):
        sizes = "--updates 12 --n-layers 1 --batch-size 2 --n-tokens 12 --prefix-length 4 --rollout-length 9"
        sizes += " --rollout-updates 4 --n-prompts 4 --n-new-tokens 8 --n-windows 4 --seeds 1"
        sizes += " --validation-updates 6"
        files = ["--output", str(tmp_path / f"{name}.json"), "--cache", str(tmp_path / name)]
        monkeypatch.setattr(sys, "argv", ["repetition.py", *sizes.split(), "--arms", arm, *files])
        calls = []

        def sequence_loss(*arguments):
            calls.append(arguments)
            if len(calls) == stop_at:
                raise Interrupted
            return whole_loss(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(repetition, "sequence_loss", sequence_loss)
            repetition.main()
        return json.loads((tmp_path / f"{name}.json").read_text()), len(calls)

    whole_loss = repetition.sequence_loss
    whole, n_calls = study("whole")
    assert n_calls == 12
    written = (tmp_path / "whole.json").stat().st_mtime_ns
    assert study("whole") == (whole, 0)  # nothing is left to do
    assert (tmp_path / "whole.json").stat().st_mtime_ns == written
    with pytest.raises(Interrupted):
        study("stopped", stop_at=7)  # the state behind update 4 is on the disk
    assert len(list((tmp_path / "stopped").glob("*.pt"))) == 1
    again, n_calls = study("stopped")
    assert n_calls == 8
    history = whole["arms"][both]["0"]["history"]
    assert again == whole and len(history) == 12
    assert [line["validation_perplexity"] > 1 for line in history if "validation_perplexity" in line] == [True, True]
    assert not list((tmp_path / "stopped").glob("*.pt"))
    assert f"| {both} | 1 |" in capsys.readouterr().out
    plain = study("whole", "cross-entropy")[0]["arms"]  # another arm joins what is there, over the same data
    losses = [plain["cross-entropy"]["0"]["history"][0]["total_loss"], plain[both]["0"]["history"][0]["main_loss"]]
    assert losses[0] == pytest.approx(losses[1]) and plain[both] == whole["arms"][both]


def test_demo_shows_what_was_before_and_after(tmp_path, monkeypatch, capsys):
    documents = torch.randint(40, (4, 2, 200), generator=torch.Generator().manual_seed(3))
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(f" {token}" for token in ids))
    monkeypatch.setattr(smollm2, "missing_packages", list)
    monkeypatch.setattr(smollm2, "load", lambda cache, n: (tiny_model(n), tokenizer))
    monkeypatch.setattr(repetition, "texts", lambda tokenizer, limit: repetition.Texts(*map(list, documents)))
    arguments = ["--quick", "--updates", "6", "--output", str(tmp_path / "demo.json"), "--cache", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["demo.py", *arguments])
    demo.main()
    found, printed = json.loads((tmp_path / "demo.json").read_text()), capsys.readouterr().out
    assert found["before"]["perplexity"] != found["after"]["perplexity"]
    for name in ("before", "after"):
        assert found[name]["seq_rep_4"] == measures.measures(found[name]["written"])["seq_rep_4"]
        assert f"{found[name]['perplexity']:.1f}" in printed and f"{found[name]['seq_rep_4']:.1%}" in printed
        assert f"{name}: {tokenizer.decode(found[name]['written'][0][:9])}" in printed


def test_what_repeats_is_red():
    tokenizer = SimpleNamespace(decode=lambda ids: "".join("abcdefgh"[token] for token in ids))
    text = demo.coloured(tokenizer, [0, 1, 2, 3, 4, 0, 1, 2, 3, 5])
    assert text.plain == "abcdeabcdf"
    assert "".join(text.plain[span.start : span.end] for span in text.spans if span.style == "red") == "abcd"


@pytest.mark.parametrize("mark", SHOWN)
def test_pages_show_the_results(mark):
    page, stem, show = SHOWN[mark]
    results = ROOT / "studies" / "results" / f"{stem}.json"
    shown = {found: text for found, text in MARKED.findall(page.read_text())}
    if results.exists():
        assert shown[mark] == "\n" + show(json.loads(results.read_text())) + "\n"
    else:
        assert mark not in shown, "a page shows numbers, and there are no results"


def run(script, *arguments):
    program = f"import runpy; runpy.run_path('studies/{script}', run_name='__main__')"
    result = run_python(program, *map(str, arguments))
    assert result.returncode == 0, result.stderr
    return result


@pytest.mark.slow
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
@pytest.mark.slow
def test_quick_run_of_the_real_model(tmp_path):
    read_before = ROOT / "build" / "study" / "smollm2"  # GGUF takes half a minute to read
    if (read_before / "weights.pt").exists():
        (tmp_path / "cache").mkdir()
        (tmp_path / "cache" / "smollm2").symlink_to(read_before)
    run("repetition.py", "--quick", "--output", tmp_path / "repetition.json", "--cache", tmp_path / "cache")
    results = json.loads((tmp_path / "repetition.json").read_text())
    assert set(results["arms"]) == {"cross-entropy", "sequence, n = 4"}
    plain, sequence = (results["arms"][name]["0"]["history"] for name in results["arms"])
    assert plain[0]["total_loss"] == pytest.approx(sequence[0]["total_loss"])  # the same weights and data
    assert all(line["repeated"] >= 0 for line in sequence) and max(line["sequence_loss"] for line in sequence) > 0
    assert [results["before"][kind]["perplexity"] > 1 for kind in ("held_out", "other")] == [True, True]
    assert [0 <= line.get("validation_seq_rep_4", -1) <= 1 for line in sequence] == [False, True, False, True]


if __name__ == "__main__":  # writes the results into the pages
    for mark, (page, stem, show) in SHOWN.items():
        results = ROOT / "studies" / "results" / f"{stem}.json"
        if results.exists():
            text = f"<!-- {mark} -->\n\n{show(json.loads(results.read_text()))}\n<!-- /{mark} -->"
            page.write_text(
                MARKED.sub(lambda m, mark=mark, text=text: text if m[1] == mark else m[0], page.read_text())
            )
