"""The parts of the training example: what it reads, what it measures, what its model may see. No training here."""

import pydoc_data.topics

import pytest
import torch

pytest.importorskip("tokenizers", reason="needs the extra: pip install '.[examples]'")

from evaluation import repeated_ngram_rate, validation_perplexity
from small_gpt import SmallGPT
from text_corpus import Corpus, segments_of, standard_library_documentation, torch_nn_documentation

CONTEXT = 16


@pytest.fixture(scope="module")
def documentation():
    """Takes seconds."""
    return standard_library_documentation()


@pytest.fixture(scope="module")
def texts():
    """Sixty short documents."""
    return [" ".join(text.split())[:600] for text in list(pydoc_data.topics.topics.values())[:60]]


@pytest.fixture(scope="module")
def corpus(texts):
    return Corpus.from_texts(texts, context=CONTEXT, vocab_size=512)


@pytest.fixture
def model(corpus):
    torch.manual_seed(0)
    model = SmallGPT(corpus.vocab_size, CONTEXT, width=32, n_layers=2, n_heads=2)
    for parameter in model.parameters():  # far from the uniform distribution that a new model predicts
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_documentation_is_long_distinct_and_collapsed(documentation):
    texts = documentation
    assert sum(map(len, texts)) > 1_000_000
    assert len(texts) == len(set(texts))
    assert min(map(len, texts)) >= 150
    for text in texts:
        assert text == " ".join(text.split())
        assert "****" not in text and "====" not in text
    assert any('The "assert" statement' in text for text in texts)  # a topic
    assert any("Serialize ``obj`` to a JSON formatted" in text for text in texts)  # a docstring: json.dumps


def test_documentation_of_torch_nn_is_another_text(documentation):
    texts = torch_nn_documentation(1200)
    assert sum(map(len, texts)) > 100_000 and min(map(len, texts)) >= 1200
    assert any("computes the cross entropy loss" in text for text in texts)

    def passages(documents):  # of 13 words
        words = [document.split() for document in documents]
        return {tuple(text[i : i + 13]) for text in words for i in range(len(text) - 12)}

    assert not passages(texts) & passages(text for text in documentation if len(text) >= 1200)


def test_tokens_give_the_texts_back(corpus, texts):
    held_out = texts[::15]
    assert [corpus.tokenizer.decode(ids.tolist()) for ids in corpus.validation_documents] == held_out
    stream = corpus.tokenizer.decode(corpus.train_tokens.tolist(), skip_special_tokens=False)
    assert stream.split("<|endoftext|>")[:-1] == [text for index, text in enumerate(texts) if index % 15]


def test_held_out_documents_are_not_trained_on(texts):
    # the same texts to train on, others held out: the tokenizer must not notice
    held_out = set(range(0, len(texts), 15))
    others = [text[::-1] if index in held_out else text for index, text in enumerate(texts)]
    corpora = [Corpus.from_texts(some, context=CONTEXT, vocab_size=512) for some in (texts, others)]
    assert corpora[0].train_tokens.equal(corpora[1].train_tokens)
    assert not corpora[0].validation_tokens.equal(corpora[1].validation_tokens)


def test_batches_are_windows_of_the_text(corpus):
    inputs, targets, _ = corpus.random_batch(5, torch.Generator().manual_seed(1))
    assert inputs.shape == targets.shape == (5, CONTEXT)
    assert inputs[:, 1:].equal(targets[:, :-1])
    windows = corpus.train_tokens.unfold(0, CONTEXT + 1, 1)
    for row in torch.cat([inputs, targets[:, -1:]], dim=1):
        assert (windows == row).all(dim=1).any()


def test_an_end_belongs_to_the_document_it_ends():
    targets = torch.tensor([[5, 0, 6, 7, 0, 0, 8], [0, 1, 2, 3, 4, 5, 6]])
    assert segments_of(targets, end_of_text=0).tolist() == [[0, 0, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1]]


def test_validation_windows_cover_the_held_out_text(corpus):
    inputs, targets = corpus.validation_windows()
    tokens = corpus.validation_tokens
    assert len(tokens) - 1 - inputs.numel() in range(CONTEXT)
    assert inputs.flatten().equal(tokens[: inputs.numel()])
    assert targets.flatten().equal(tokens[1 : inputs.numel() + 1])


def test_prompts_start_held_out_documents(corpus):
    prompts, continuations = corpus.prompts(prompt_length=6)
    texts = torch.cat([prompts, continuations], dim=1)
    assert prompts.shape[1] == 6 and texts.shape[1] == CONTEXT
    assert texts.tolist() == [ids[:CONTEXT].tolist() for ids in corpus.validation_documents if len(ids) >= CONTEXT]


@pytest.mark.parametrize(
    ("text", "n", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 7, 8], 4, 0.0),
        ([1, 2, 3, 4, 1, 2, 3, 4], 4, 1 / 5),
        ([7, 7, 7, 7, 7, 7, 7], 4, 3 / 4),  # four equal 4-grams, three of them repeat the first
        ([1, 2, 1, 2, 1, 2, 1, 2, 1], 4, 4 / 6),
        ([1, 2, 3, 4, 1, 2, 3, 9], 4, 0.0),  # three tokens again are no 4-gram
        ([1, 2, 3, 1, 2, 3, 1], 1, 4 / 7),
    ],
)
def test_repeated_ngram_rate(text, n, expected):
    assert repeated_ngram_rate(torch.tensor([text]), n) == pytest.approx(expected)


def test_repeated_ngram_rate_does_not_count_across_texts():
    texts = torch.tensor([[1, 2, 3, 4, 5], [1, 2, 3, 4, 5], [9, 9, 9, 9, 9]])
    assert repeated_ngram_rate(texts) == pytest.approx(1 / 6)


def test_model_sees_no_later_token(corpus, model):
    ids = torch.randint(corpus.vocab_size, (3, CONTEXT))
    logits = model(ids)
    for position in range(1, CONTEXT):
        changed = ids.clone()
        changed[:, position:] = torch.randint(corpus.vocab_size, (3, CONTEXT - position))
        torch.testing.assert_close(model(changed)[:, :position], logits[:, :position], rtol=1e-5, atol=1e-5)
    changed = ids.clone()
    changed[:, 0] = (ids[:, 0] + 1) % corpus.vocab_size
    assert (model(changed) - logits).abs().amax(dim=(0, 2)).gt(1e-3).all()  # but every earlier one


def test_greedy_is_the_likeliest_token_of_the_whole_text_so_far(corpus, model):
    prompts = torch.randint(corpus.vocab_size, (4, 5))
    for banned_token in (None, corpus.end_of_text):
        text = prompts
        while text.shape[1] < CONTEXT:
            logits = model(text)[:, -1]
            if banned_token is not None:
                logits[:, banned_token] = float("-inf")
            text = torch.cat([text, logits.argmax(dim=1, keepdim=True)], dim=1)
        assert model.greedy(prompts, CONTEXT - 5, banned_token).equal(text[:, 5:])


def test_greedy_never_chooses_the_banned_token(corpus, model):
    prompts = torch.randint(corpus.vocab_size, (4, 5))
    favourite = model.greedy(prompts, 1)[0].item()
    assert favourite not in model.greedy(prompts, CONTEXT - 5, banned_token=favourite)


def test_validation_perplexity(corpus, model):
    inputs, targets = corpus.validation_windows()
    log_probs = model(inputs).double().log_softmax(dim=-1)
    expected = log_probs.gather(-1, targets.unsqueeze(-1)).mean().neg().exp().item()
    assert validation_perplexity(model, corpus) == pytest.approx(expected, rel=1e-5)
    for parameter in model.parameters():
        torch.nn.init.zeros_(parameter)
    assert validation_perplexity(model, corpus) == pytest.approx(corpus.vocab_size, rel=1e-5)
