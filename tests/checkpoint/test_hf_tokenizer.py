"""Tokenizer files of an exported folder: read by the libraries that will read them."""

import json
import random
from pathlib import Path

import pytest
import tokenizers

from dsv3_jax.checkpoint import hf_tokenizer
from dsv3_jax.checkpoint.hf_tokenizer import source_files, tokenizer_files
from dsv3_jax.data.chat import ChatTemplate, encode_chat, load_chat_template
from dsv3_jax.data.tokenizer import BOS, EOS, load_tokenizer, train_tokenizer
from dsv3_jax.errors import UserError

RELEASED = Path(__file__).parents[2].parent / "shared/data/deepseek/tokenizer.json.gz"
CASES = json.loads((Path(__file__).parents[1] / "data/golden_chat.json").read_text("utf-8"))


@pytest.fixture(scope="module", params=["trained", "released"])
def exported(request, tmp_path_factory):
    """A tokenizer and the folder of its files."""
    if request.param == "trained":
        tokenizer = train_tokenizer([Path(json.__file__).read_text(), "Why blue?"], 700)
    elif RELEASED.exists():
        tokenizer = load_tokenizer(RELEASED)
    else:
        pytest.skip("no released tokenizer here")
    folder = tmp_path_factory.mktemp("exported")
    for name, contents in tokenizer_files(tokenizer, model_max_length=4096).items():
        (folder / name).write_bytes(contents)
    (folder / "config.json").write_text('{"model_type": "deepseek_v3"}')
    return tokenizer, folder


def _texts():
    rng = random.Random(random.random())
    alphabet = "abc XYZ019\n\t.,(){}é漢かक😀\u0301"
    texts = ["".join(rng.choices(alphabet, k=rng.randrange(40))) for _ in range(300)]
    return ["", "import json\n", *texts]


def test_the_library_prepends_bos_and_agrees_otherwise(exported):
    tokenizer, folder = exported
    library = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    reread = load_tokenizer(folder)
    for text in _texts():
        ids = tokenizer.encode(text)
        assert library.encode(text).ids == [tokenizer.bos_id, *ids], ascii(text)
        assert reread.encode(text) == ids, ascii(text)  # ours adds none
    assert reread.control_ids == tokenizer.control_ids and reread.fim == tokenizer.fim
    config = json.loads((folder / "tokenizer_config.json").read_text("utf-8"))
    assert (config["bos_token"], config["eos_token"], config["pad_token"]) == (BOS, EOS, EOS)
    assert config["add_bos_token"] is True and config["add_eos_token"] is False
    assert config["model_max_length"] == 4096
    generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    assert generation == {"bos_token_id": 0, "eos_token_id": 1}


def test_the_folder_carries_a_chat_template(exported):
    tokenizer, folder = exported
    template = load_chat_template(folder)
    for case in CASES:
        parts = case["messages"], case["add_generation_prompt"], case.get("tools")
        assert template.render(*parts) == case["text"]
    files = tokenizer_files(tokenizer, model_max_length=1, chat_template="{{ eos_token }} ü")
    (folder / "other.json").write_bytes(files["tokenizer_config.json"])
    assert load_chat_template(folder / "other.json").render([]) == f"{EOS} ü"


def test_transformers_agrees(exported):
    transformers = pytest.importorskip("transformers")
    tokenizer, folder = exported
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (0, 1, 1)
    assert theirs.model_max_length == 4096 and len(theirs) == tokenizer.vocab_size
    for text in _texts():
        ids = tokenizer.encode(text)
        assert theirs(text)["input_ids"] == [0, *ids]
        assert theirs.decode([0, *ids, 1], skip_special_tokens=True) == text
    for case in CASES:
        settings = {k: case.get(k) for k in ("add_generation_prompt", "tools")}
        assert (
            theirs.apply_chat_template(case["messages"], tokenize=False, **settings)
            == (case["text"])
        )
        ids = theirs.apply_chat_template(
            case["messages"], tokenize=True, return_dict=False, **settings
        )
        assert ids == encode_chat(tokenizer, ChatTemplate(), case["messages"], **settings)
    generation = transformers.GenerationConfig.from_pretrained(folder)
    assert (generation.bos_token_id, generation.eos_token_id) == (0, 1)


def test_small_files_are_carried_along_and_nothing_else(tmp_path, monkeypatch):
    carried = {
        "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json",
        "generation_config.json", "chat_template.jinja", "modeling_deepseek.py", "LICENSE",
        "LICENSE-MODEL",
    }  # fmt: skip
    left = {
        "config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors",
        "pytorch_model.bin", "MANIFEST.json", "README.md", ".gitattributes",
    }  # fmt: skip
    for name in carried | left:
        (tmp_path / name).write_bytes(name.encode() + b"\x00\xff")
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "LICENSE").write_text("inner")
    found = source_files(tmp_path)
    assert found == {name: name.encode() + b"\x00\xff" for name in carried}
    size = sum(map(len, found.values()))
    monkeypatch.setattr(hf_tokenizer, "MAX_CARRIED_BYTES", size)
    assert source_files(tmp_path) == found
    (tmp_path / "tokenizer.model").write_bytes(b"x" * 300)
    with pytest.raises(UserError, match=r"more than .* move the largest away: tokenizer\.model"):
        source_files(tmp_path)
