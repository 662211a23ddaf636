import io
import json
import shutil

import mlx.core as mx
import pytest
import sentencepiece
from mlx_lm.utils import save_config, save_model

from flashmoe import FlashMoEModel, PromptError, SourceError, repack
from flashmoe.generation.report import Ledger
from flashmoe.generation.session import Session
from tests.support.families import FAMILIES, build_model, save_checkpoint
from tests.support.scripted import ScriptedModel

TEXTS = [
    "alpha beta gamma",
    "alphabet",
    "alpha  beta,   gamma",
    "line one\nline two\n\n\tline three",
    "2024 kappa 007",
    "é漢字🙂 mu 👩‍👩‍👧 ß",
    "theta ",
    " lead",
    "x",
]
BOS, EOS = 1, 2


@pytest.fixture(scope="module")
def pieces():
    """A SentencePiece model with the settings of Llama's and Mixtral's, but 340 pieces."""
    words = ["alpha", "beta", "gamma", "delta", "epsilon", "theta", "kappa", "lambda", "mu", "x"]
    sentences = [" ".join(words[i % 10 :] + words[: i % 7]) for i in range(100)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences),
        model_writer=model,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        unk_id=0,
        bos_id=BOS,
        eos_id=EOS,
        pad_id=-1,
        character_coverage=1.0,
        normalization_rule_name="identity",
        add_dummy_prefix=True,
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        split_digits=True,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.fixture(scope="module", params=["bare", "LlamaTokenizer"])
def spoken(request, pieces, tmp_path_factory):
    """A Mixtral that has tokenizer.model only, or with the class named, loaded from a store."""
    folder = tmp_path_factory.mktemp("mixtral") / request.param
    folder.mkdir()
    size = pieces.get_piece_size()
    config = {
        **FAMILIES["mixtral"],
        "vocab_size": size,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    model = build_model(config, seed=0)
    # No stray bytes: those that are no UTF-8 have no text that all decoders agree on.
    is_word = mx.array([not pieces.is_byte(i) and i > 2 for i in range(size)])
    model.lm_head.weight = mx.where(is_word[:, None], model.lm_head.weight, 0)
    save_model(folder, model)
    save_config(config, folder / "config.json")
    (folder / "tokenizer.model").write_bytes(pieces.serialized_model_proto())
    if request.param != "bare":
        (folder / "tokenizer_config.json").write_text(
            json.dumps({"tokenizer_class": request.param})
        )
    store = repack(folder, folder.with_suffix(".flashmoe"))
    assert "tokenizer.model" in store.manifest.copied
    shutil.rmtree(folder)
    with FlashMoEModel.from_pretrained(store.path) as model:
        yield model


def streamed(tokenizer, ids):
    """The text pieces of a session whose model says `ids`."""
    model = ScriptedModel(ids, len(tokenizer))
    session = Session(model, tokenizer, Ledger(), context=4096, chunk=64)
    return [piece.text for piece in session.stream([5], max_new_tokens=len(ids))]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_ids(spoken, pieces, text):
    """The ids that the model was trained on: SentencePiece's own, and the start token."""
    assert spoken.tokenizer.encode(text) == [BOS, *pieces.encode(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_sentencepiece_round_trip(spoken, pieces, text):
    assert spoken.tokenizer.decode(pieces.encode(text)) == text
    ids = spoken.tokenizer.encode(text)
    assert spoken.tokenizer.decode(ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith(" ")])
def test_sentencepiece_streams_what_it_decodes(spoken, pieces, text):
    """Byte by byte, and also after line ends, where no space may get lost."""
    ids = pieces.encode(text)
    parts = streamed(spoken.tokenizer, ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_sentencepiece_streams_words_as_they_come(spoken, pieces):
    parts = streamed(spoken.tokenizer, pieces.encode("alpha beta gamma"))
    assert parts == ["alpha", " beta", " gamma", ""]


def test_sentencepiece_stops_at_its_end_token(spoken):
    assert spoken.tokenizer.eos_token_ids == {EOS}
    assert spoken.tokenizer.bos_token_id == BOS
    assert len(spoken.tokenizer) == 340


def test_sentencepiece_generates(spoken, pieces):
    said = list(spoken.stream("alpha beta gamma", 40))
    ids = [piece.token for piece in said if piece.token is not None]
    assert len(ids) == 40
    text = "".join(piece.text for piece in said)
    assert text == spoken.tokenizer.decode(ids) == pieces.decode(ids)


# The demo's byte-level BPE.


@pytest.fixture(scope="module")
def byte_level(demo_store):
    with FlashMoEModel.from_pretrained(demo_store, cache="min") as model:
        yield model.tokenizer


@pytest.mark.parametrize("text", TEXTS)
def test_byte_level_round_trip(byte_level, text):
    assert byte_level.decode(byte_level.encode(text)) == text


@pytest.mark.parametrize("text", [text for text in TEXTS if not text.startswith(" ")])
def test_byte_level_streams_what_it_decodes(byte_level, text):
    ids = byte_level.encode(text)
    parts = streamed(byte_level, ids)
    assert "".join(parts) == text
    assert not any("\ufffd" in part for part in parts)


def test_byte_level_holds_back_incomplete_characters(byte_level):
    ids = byte_level.encode("🙂", add_special_tokens=False)
    assert len(ids) > 1
    assert streamed(byte_level, ids) == [""] * (len(ids) - 1) + ["🙂", ""]
    assert "".join(streamed(byte_level, ids[:-1])) == "\ufffd"


def test_an_answer_is_cut_in_the_middle_of_a_character(byte_level):
    ids = byte_level.encode("naïve 漢")
    text = "".join(streamed(byte_level, ids[:-1]))
    assert text == byte_level.decode(ids[:-1])


# No tokenizer.


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "phixtral"])
def test_a_checkpoint_without_a_tokenizer(home, tmp_path, family):
    """Ids are all that it understands."""
    folder = tmp_path / "mute"
    folder.mkdir()
    save_checkpoint(folder, family)
    with FlashMoEModel.from_pretrained(folder) as model:
        pieces = list(model.stream([3, 1, 127], 5))
        assert [piece.text for piece in pieces] == [""] * 6
        assert all(0 <= piece.token < 128 for piece in pieces[:-1])
        for ids in ([128], [-1]):
            with pytest.raises(PromptError, match="outside the vocabulary of 128"):
                model.stream(ids)
        with pytest.raises(PromptError, match="no tokenizer"):
            model.stream("What is a barn?")
        with pytest.raises(PromptError, match=r"no tokenizer|no chat template"):
            model.stream([{"role": "user", "content": "What is a barn?"}])


def refused(folder):
    with pytest.raises(SourceError) as error:
        FlashMoEModel.from_pretrained(folder)
    text = str(error.value)
    assert "\n" not in text
    assert len(text) < 600
    assert "tokenizer" in text


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("config", [{}, {"tokenizer_class": "Qwen2Tokenizer"}], ids=str)
def test_a_tokenizer_without_its_vocabulary(home, tmp_path, family, config):
    """transformers makes an empty tokenizer of it, to which every text is empty."""
    folder = tmp_path / "empty"
    folder.mkdir()
    save_checkpoint(folder, family)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    refused(folder)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b"{"),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"\xff\xfe"),
        ("tokenizer.model", b"not a protocol buffer"),
        ("tokenizer.model", b""),
    ],
)
def test_a_broken_tokenizer(home, tmp_path, name, content):
    folder = tmp_path / "broken"
    folder.mkdir()
    save_checkpoint(folder, "mixtral")
    (folder / name).write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("family", ["mixtral", "kimi_k25", "kimi_linear", "bailing_moe"])
def test_a_tokenizer_that_is_code(home, tmp_path, monkeypatch, family):
    """Code of a checkpoint is not run, and nobody is asked whether it may be."""
    folder = tmp_path / "code"
    folder.mkdir()
    save_checkpoint(folder, family)
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "OwnTokenizer",
                "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]},
            }
        )
    )
    (folder / "own.py").write_text("raise SystemExit('ran')")
    asked = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    refused(folder)
    assert asked == []
