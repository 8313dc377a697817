"""Plain text files become blocks of tokens."""

from __future__ import annotations

from transformers import AutoTokenizer


def test_a_plain_text_file_holds_out_its_end(tiny_model, tmp_path):
    from lp_dist.data.text import load_text, pack

    text = tmp_path / "book.txt"
    text.write_text("".join(f"line {i}\n" for i in range(100)))
    splits = load_text(str(text), None, "train", "text", None, 0.1, seed=0)
    assert splits["eval"]["text"] == [f"line {i}\n" for i in range(90, 100)]
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    blocks = pack(splits["train"], tokenizer, 16, separate=False)
    joined = tokenizer.decode([token for block in blocks["input_ids"] for token in block])
    assert "".join(f"line {i}\n" for i in range(90)).startswith(joined) and all(
        len(b) == 16 for b in blocks["input_ids"]
    )
