"""Token caches of other codebases."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_models import tiny

from vistok.cli import main
from vistok.data import TokenCache
from vistok.data.peers import PeerCacheError
from vistok.data.tokens import sample_moments
from vistok.train.import_tokens import import_tokens


def write_llamagen(root: Path, count: int = 12, views: int = 10) -> np.ndarray:
    codes = np.random.default_rng(0).integers(0, 32, (count, views, 16))
    for kind in ("codes", "labels"):
        (root / f"imagenet256_{kind}").mkdir(parents=True)
    for number in range(count):
        np.save(root / "imagenet256_codes" / f"{number}.npy", codes[number : number + 1])
        np.save(root / "imagenet256_labels" / f"{number}.npy", np.array([number % 3]))
    return codes


def test_llamagen_codes(tmp_path):
    codes = write_llamagen(tmp_path / "codes")
    tokenizer = tiny("llamagen_vq")
    cache = import_tokens("llamagen", tmp_path / "codes", tokenizer, tmp_path / "tokens")
    for view in (0, 9):
        got, labels = cache.batch(np.arange(12), np.full(12, view))
        assert np.array_equal(got.numpy(), codes[:, view])  # file 10 comes after file 9
        assert labels.tolist() == [number % 3 for number in range(12)]
    assert (cache.views, cache.classes) == (10, ("0", "1", "2"))
    cache.check_tokenizer(tokenizer.fingerprint())


def test_mar_moments_are_standardised_as_the_tokenizer_would(tmp_path):
    tokenizer = tiny("kl_vae", latent_mean=0.25, latent_scale=0.5)
    pixels = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        expected = torch.stack([tokenizer.encode_moments(p) for p in (pixels, pixels.flip(-1))], 1)
        for number, image in enumerate(pixels):
            mean, log_variance = (
                torch.cat(parts) for parts in zip(*(tokenizer.moments(view[None]) for view in (image, image.flip(-1))))
            )
            raw = torch.cat([mean, log_variance], -1).transpose(1, 2).unflatten(2, (4, 4)).numpy()  # (2, 2D, h, w)
            folder = tmp_path / "mar" / f"n{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            np.savez(folder / f"{number}.npz", moments=raw[0], moments_flip=raw[1])
    cache = import_tokens("mar", tmp_path / "mar", tokenizer, tmp_path / "tokens")
    assert (cache.content, cache.views, cache.classes) == ("moments", 2, ("n0", "n1"))
    order = [0, 2, 1, 3]  # sorted by class
    for view in (0, 1):
        got, _ = cache.batch(np.arange(4), np.full(4, view))
        assert torch.allclose(got, expected[order, view], atol=1e-5)
        assert sample_moments(got, torch.zeros(4, 16, 4)).shape == (4, 16, 4)


def test_json_lines_by_command(tmp_path, capsys):
    rows = [{"class_id": number % 2, "tokens": [number] * 16} for number in range(5)]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    tiny("vit_vqgan").save_pretrained(tmp_path / "tokenizer")
    arguments = ["--tokenizer", str(tmp_path / "tokenizer"), "--classes", str(tmp_path / "names.txt")]
    with pytest.raises(SystemExit) as ended:
        main(["import-tokens", "jsonl", str(tmp_path / "t.jsonl"), *arguments, "--out", str(tmp_path / "tokens")])
    assert not ended.value.code
    assert "5 samples in 1 views each" in capsys.readouterr().out
    cache = TokenCache(tmp_path / "tokens")
    assert cache.classes == ("cat", "dog")
    assert cache.batch([3], [0])[0].tolist() == [[3] * 16]


def refused(tmp_path: Path, message: str, format_name: str, name: str = "llamagen_vq", error=PeerCacheError) -> None:
    with pytest.raises(error, match=message):
        import_tokens(format_name, tmp_path / "in", tiny(name), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_damaged_and_foreign_caches_leave_nothing(tmp_path):
    refused(tmp_path, "unknown format 'var'; known: llamagen, mar, jsonl", "var")
    refused(tmp_path, "is not a folder, which the format mar is", "mar")
    write_llamagen(tmp_path / "in")
    refused(tmp_path, "holds ids, which a KLVAE does not make", "llamagen", "kl_vae")
    refused(tmp_path, "there are no samples", "mar")
    codes = tmp_path / "in" / "imagenet256_codes"
    np.save(codes / "3.npy", np.full((1, 10, 16), 32))
    refused(tmp_path, r"token id 32 is out of range 0\.\.31", "llamagen", error=ValueError)
    np.save(codes / "3.npy", np.zeros((1, 9, 16), dtype=int))
    refused(tmp_path, r"differ in shape: \[\(9, 16\), \(10, 16\)\]", "llamagen")
    (codes / "3.npy").write_bytes(b"\x93NUMPY")
    refused(tmp_path, r"3\.npy cannot be read", "llamagen")
    (codes.with_name("imagenet256_labels") / "4.npy").unlink()
    refused(tmp_path, r"1 codes have no label .* such as 4\.npy", "llamagen")


def test_a_bad_line_is_named(tmp_path):
    (tmp_path / "in").write_text('{"class_id": 1, "tokens": [1]}\n{"tokens": [1]}\n')
    refused(tmp_path, "line 2: no class_id and tokens", "jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"class_id": 0, "tokens": [1.9, 2]}', "holds float64 in the place of ids"),
        ('{"class_id": 0, "tokens": [1e400, 2]}', "holds float64 in the place of ids"),
        ('{"class_id": 0, "tokens": ["1", "2"]}', "in the place of ids"),
        ('{"class_id": 0, "tokens": [99, 2]}', r"token id 99 is out of range 0\.\.31"),
        ('{"class_id": 1e400, "tokens": [1, 2]}', "a class id is an integer from 0, or -1 for no class; got inf"),
        ('{"class_id": 1.9, "tokens": [1, 2]}', "got 1.9"),
        ('{"class_id": -2, "tokens": [1, 2]}', "got -2"),
        ('{"class_id": -1, "tokens": [1, 2]}', "label -1 is out of range"),
        ('{"class_id": 30000000, "tokens": [1, 2]}', "more than 100,000 classes"),
        ('{"class_id": true, "tokens": [1, 2]}', "got True"),
        ('{"class_id": 0, "tokens": [[1], 2]}', "no class_id and tokens"),
        ('{"class_id": 0, "tokens": [[1, 2]]}', r"nested, of the shape \(1, 16\)"),
        ("[" * 5000, "no class_id and tokens"),
    ],
)
def test_ids_and_labels_are_whole_and_named_with_their_line(tmp_path, line, message):
    good = json.dumps({"class_id": 1, "tokens": [3] * 16})
    line = line.replace("2]", ", ".join(["2"] * 15) + "]", 1)
    (tmp_path / "x.jsonl").write_text(f"{good}\n{line}\n")
    with pytest.raises(PeerCacheError, match=rf"x\.jsonl, line 2.*{message}"):
        import_tokens("jsonl", tmp_path / "x.jsonl", tiny("llamagen_vq"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "value"), [("codes", 1.9), ("labels", 1.0), ("labels", -2)])
def test_llamagen_files_are_named(tmp_path, kind, value):
    write_llamagen(tmp_path / "in")
    path = tmp_path / "in" / f"imagenet256_{kind}" / "3.npy"
    np.save(path, np.full_like(np.load(path), value, dtype=type(value)))
    with pytest.raises(PeerCacheError, match=r"3\.npy"):
        import_tokens("llamagen", tmp_path / "in", tiny("llamagen_vq"), tmp_path / "out")


def test_files_of_other_encodings(tmp_path):
    good = json.dumps({"class_id": 0, "tokens": [3] * 16}) + "\n"
    for number, content in enumerate((good.encode("utf-16"), b"\x93NUMPY", good.encode() + b"\xff\n")):
        (tmp_path / "x.jsonl").write_bytes(content)
        with pytest.raises(PeerCacheError, match=rf"x\.jsonl, line {2 if number == 2 else 1}: no class_id"):
            import_tokens("jsonl", tmp_path / "x.jsonl", tiny("llamagen_vq"), tmp_path / "out")
    (tmp_path / "x.jsonl").write_bytes(good.encode("utf-8-sig") + good.encode())
    assert len(import_tokens("jsonl", tmp_path / "x.jsonl", tiny("llamagen_vq"), tmp_path / "out")) == 2


def test_a_sample_of_another_length_is_named(tmp_path):
    rows = [{"class_id": 0, "tokens": [3] * length} for length in (16, 16, 17)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(PeerCacheError, match=r"differ in shape: .* line 1 and .*x\.jsonl, line 3"):
        import_tokens("jsonl", tmp_path / "x.jsonl", tiny("llamagen_vq"), tmp_path / "out")
