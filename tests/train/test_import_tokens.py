"""Token caches of other codebases."""

from __future__ import annotations

import io
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
    good = json.dumps({"class_id": 1, "tokens": [3] * 16})
    (tmp_path / "in").write_text(good + '\n{"tokens": [1]}\n')
    refused(tmp_path, "line 2: no class_id and tokens", "jsonl")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"class_id": 0, "tokens": [1.9, 2]}', "tokens are one list of ids, which are integers; got 1.9"),
        ('{"class_id": 0, "tokens": [1e400, 2]}', "got inf"),
        ('{"class_id": 0, "tokens": [NaN, 2]}', "got nan"),
        ('{"class_id": 0, "tokens": ["1", "2"]}', "got '1'"),
        ('{"class_id": 0, "tokens": [true, 2]}', "got True"),
        ('{"class_id": 0, "tokens": [null, 2]}', "got None"),
        ('{"class_id": 0, "tokens": "1 2"}', "got '1 2'"),
        ('{"class_id": 0, "tokens": {"a": 1}}', "got {'a': 1}"),
        (
            '{"class_id": 0, "tokens": [99, 2]}',
            r"token id 99 is out of range 0\.\.31 of this LlamaGenVQ; name the token",
        ),
        ('{"class_id": 0, "tokens": [2147483648, 2]}', r"token id 2147483648 is out of range 0\.\.31"),
        ('{"class_id": 0, "tokens": [9223372036854775808, 2]}', "holds the id 9223372036854775808"),
        ('{"class_id": 1e400, "tokens": [1, 2]}', "a class id is an integer from 0, or -1 for no class; got inf"),
        ('{"class_id": 1.9, "tokens": [1, 2]}', "got 1.9"),
        ('{"class_id": -2, "tokens": [1, 2]}', "got -2"),
        ('{"class_id": -1, "tokens": [1, 2]}', "label -1 is out of range"),
        ('{"class_id": 30000000, "tokens": [1, 2]}', "more than 100,000 classes"),
        ('{"class_id": true, "tokens": [1, 2]}', "got True"),
        ('{"class_id": 0, "tokens": [[1], 2]}', r"got \[1\]"),
        ('{"class_id": 0, "tokens": [[1, 2]]}', r"got \[1, 2, "),
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


def npy(value) -> bytes:
    content = io.BytesIO()
    np.save(content, np.asarray(value), allow_pickle=True)
    return content.getvalue()


CODES = np.arange(32).reshape(1, 2, 16)
ARCHIVE = io.BytesIO()
np.savez(ARCHIVE, a=CODES, b=CODES)


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("codes", npy(CODES + 0.9), "codes/3.npy holds float64 in the place of ids"),
        ("codes", npy(np.full((1, 2, 16), np.nan)), "codes/3.npy holds float64"),
        ("codes", npy(CODES > 5), "codes/3.npy holds bool"),
        ("codes", npy(CODES + 0j), "codes/3.npy holds complex128"),
        ("codes", npy(CODES.astype(str)), "codes/3.npy holds <U21"),
        ("codes", npy(CODES.astype(object)), "codes/3.npy cannot be read .* with Python objects in it"),
        ("codes", npy(CODES.astype("datetime64[s]")), "codes/3.npy holds datetime64"),
        ("codes", npy(CODES - 1), r"codes/3.npy: token id -1 is out of range 0\.\.31"),
        ("codes", npy(CODES + 2**40), "codes/3.npy: token id 1099511627776 is out of range"),
        ("codes", npy(CODES.astype(np.uint64) + np.uint64(2**63)), "codes/3.npy holds the id 9223372036854775839"),
        ("codes", npy(CODES[:0]), r"codes/3.npy holds codes \(0, 2, 16\)"),
        ("codes", npy(CODES[:, :0]), "codes/0.npy and .*codes/3.npy"),
        ("codes", npy(CODES[:, :, :15]), r"differ in shape: \[\(2, 15\), \(2, 16\)\], .*codes/3.npy"),
        ("codes", npy(CODES[0]), r"codes/3.npy holds codes \(2, 16\) with a label \(1,\)"),
        ("codes", ARCHIVE.getvalue(), "codes/3.npy is an archive of a, b; expected one array"),
        ("codes", b"", "codes/3.npy cannot be read"),
        ("codes", b"hello", "codes/3.npy cannot be read .no file of NumPy, or one with Python objects"),
        ("labels", npy([1.9]), "labels/3.npy: a class id is an integer from 0, .* got 1.9"),
        ("labels", npy([np.nan]), "labels/3.npy: .* got nan"),
        ("labels", npy([-1]), r"3.npy: label -1 is out of range 0\.\.2; every sample needs one of the 3 classes"),
        ("labels", npy([-5]), "labels/3.npy: .* got -5"),
        ("labels", npy([2**40]), "labels/3.npy: 1099511627776 would be one of more than 100,000 classes"),
        ("labels", npy([1 + 0j]), "labels/3.npy: "),
        ("labels", npy([True]), "labels/3.npy: .* got True"),
        ("labels", npy([1, 2]), r"3.npy holds codes \(1, 2, 16\) with a label \(2,\)"),
        ("labels", npy(np.zeros(0, int)), r"3.npy holds codes .* with a label \(0,\)"),
        ("labels", ARCHIVE.getvalue(), "labels/3.npy is an archive of a, b"),
    ],
)
def test_llamagen_files_of_other_kinds_are_named(tmp_path, kind, content, message):
    write_llamagen(tmp_path / "in", views=2)
    (tmp_path / "in" / f"imagenet256_{kind}" / "3.npy").write_bytes(content)
    refused(tmp_path, message, "llamagen")


@pytest.mark.parametrize("as_type", [np.uint8, np.int8, ">i4", np.asfortranarray])
def test_integers_of_every_kind_are_read(tmp_path, as_type):
    codes = write_llamagen(tmp_path / "in", views=2)
    path = tmp_path / "in" / "imagenet256_codes" / "3.npy"
    np.save(
        path, as_type(codes[3:4]) if callable(as_type) and as_type is np.asfortranarray else codes[3:4].astype(as_type)
    )
    cache = import_tokens("llamagen", tmp_path / "in", tiny("llamagen_vq"), tmp_path / "out")
    assert np.array_equal(cache.batch([3], [1])[0].numpy(), codes[3:4, 1])


def test_a_label_without_codes_is_named(tmp_path):
    write_llamagen(tmp_path / "in")
    (tmp_path / "in" / "imagenet256_codes" / "7.npy").unlink()
    refused(tmp_path, r"1 labels have no codes in .*_codes, such as 7\.npy", "llamagen")


@pytest.mark.parametrize(("length", "views"), [(15, 2), (17, 2), (16, 0)])
def test_tokens_of_another_length_than_the_tokenizer_makes(tmp_path, length, views):
    write_llamagen(tmp_path / "in")
    for path in (tmp_path / "in" / "imagenet256_codes").iterdir():
        np.save(path, np.zeros((1, views, length), dtype=int))
    refused(
        tmp_path,
        rf"0\.npy holds {length} values in {views} views, .* LlamaGenVQ makes 16 .* name the tokenizer",
        "llamagen",
    )


MOMENTS = np.random.default_rng(0).normal(size=(8, 4, 4)).astype(np.float32)


@pytest.mark.parametrize(
    ("moments", "flipped", "message"),
    [
        (MOMENTS * np.nan, MOMENTS, "1.npz, moments has values that are not finite"),
        (MOMENTS, np.full_like(MOMENTS, np.inf), "1.npz, moments_flip has values that are not finite"),
        (MOMENTS.astype(float) * 1e300, MOMENTS, "1.npz, moments has values that are not finite, as float32"),
        (MOMENTS.astype(int), MOMENTS, r"1.npz, moments is int64 \(8, 4, 4\); expected floats \(2D, h, w\)"),
        (MOMENTS, MOMENTS + 1j, "1.npz, moments_flip is complex64"),
        (MOMENTS > 0, MOMENTS, "1.npz, moments is bool"),
        (MOMENTS[None], MOMENTS[None], r"1.npz, moments is float32 \(1, 8, 4, 4\); expected floats"),
        (MOMENTS, MOMENTS[:, :3], r"1.npz holds moments \(8, 4, 4\) and moments_flip \(8, 3, 4\)"),
        (MOMENTS[:7], MOMENTS[:7], "1.npz holds 7 x 4 x 4 values in 2 views, .* KLVAE makes 8 x h x w"),
        (MOMENTS[:, :3], MOMENTS[:, :3], "1.npz holds 8 x 3 x 4 values in 2 views"),
        (MOMENTS.transpose(1, 2, 0), MOMENTS.transpose(1, 2, 0), "1.npz holds 4 x 4 x 8 values"),
    ],
)
def test_moments_that_do_not_fit_are_named(tmp_path, moments, flipped, message):
    (tmp_path / "in" / "n0").mkdir(parents=True)
    np.savez(tmp_path / "in" / "n0" / "1.npz", moments=moments, moments_flip=flipped)
    refused(tmp_path, message, "mar", "kl_vae")


def test_a_line_that_is_no_text_is_not_printed_whole(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"\xff" * 100_000)
    with pytest.raises(PeerCacheError, match="line 1: no class_id and tokens") as caught:
        import_tokens("jsonl", tmp_path / "x.jsonl", tiny("llamagen_vq"), tmp_path / "out")
    assert len(str(caught.value)) < 500
