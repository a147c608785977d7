"""Volumes: files of all kinds, hostile and damaged ones, and objects of other libraries."""
import gzip
import os
from pathlib import Path

import nibabel as nib
import numpy as np
import pandas as pd
import pytest
import torchio as tio

from explainable_mri.data.cache import load_volumes, residual_maps
from explainable_mri.data.residuals import ResidualModel
from explainable_mri.data.volumes import (
    GRIDS, Grid, Volume, VolumeError, check_volume, find_grid, get_grid, load_map, load_volume, save_volume)

GRID = get_grid("mni_3mm")
NIFTI1 = {"datatype": 70, "vox_offset": 108, "qform_code": 252, "sform_code": 254, "sform": 280}  # places in the header


@pytest.fixture
def volume() -> Volume:
    return Volume(np.random.default_rng(0).random(GRID.cropped_shape, np.float32), GRID)


@pytest.fixture
def path(volume, tmp_path) -> Path:
    return volume.save(tmp_path / "scan.nii.gz")


def edited(path: Path, name: str, **fields: bytes) -> Path:
    "A copy of a file with other bytes in its header."
    content = bytearray(gzip.decompress(path.read_bytes()))
    for field, value in fields.items():
        content[NIFTI1[field]:NIFTI1[field] + len(value)] = value
    made = path.with_name(name)
    made.write_bytes(gzip.compress(bytes(content), 1))
    return made


@pytest.mark.parametrize("name", GRIDS)
def test_grid_of_a_file_is_the_built_in_one(name, tmp_path):
    grid = GRIDS[name]
    path = save_volume(np.zeros(grid.cropped_shape, np.float32), tmp_path / "map.nii", grid)
    own = Grid.from_image(path)
    assert (own.shape, own.name) == (grid.shape, "map.nii") and np.allclose(own.affine, grid.affine)
    assert find_grid(path) is grid and own.cropped_shape == own.shape
    assert (own == grid) == (grid.cropped_shape == grid.shape)


def test_grid_keeps_a_rotation():
    turn = np.array([[0.8, -0.6, 0], [0.6, 0.8, 0], [0, 0, 1]]) * 2
    grid = Grid.from_image(nib.Nifti1Image(np.ones((4, 5, 6), np.float32), nib.affines.from_matvec(turn, (1, 2, 3))))
    assert np.allclose(grid.affine[:3, :3], turn) and grid.voxel_size == pytest.approx((2, 2, 2))


def test_scan_without_a_grid_has_its_own(path, volume):
    whole = load_volume(path)
    assert whole.grid.name == "scan.nii.gz" and whole.source == path
    assert np.array_equal(GRID.crop(whole.array), volume.array)


def test_objects_of_other_libraries_come_in_and_out(volume, path):
    image = nib.load(path)
    for other in (image, image.as_reoriented([[0, -1], [2, 1], [1, -1]]), volume.to_torchio(), tio.ScalarImage(path), volume, str(path)):
        assert np.array_equal(Volume.from_image(other, GRID).array, volume.array)
    mgh = nib.MGHImage(image.get_fdata(dtype=np.float32), image.affine)
    nib.save(mgh, path.with_name("scan.mgz"))
    nib.save(nib.Nifti1Pair(image.get_fdata(dtype=np.float32), image.affine), path.with_name("scan.img"))
    nib.save(nib.Nifti2Image(image.get_fdata(dtype=np.float32), image.affine), path.with_name("two.nii.gz"))
    for name in ("scan.mgz", "scan.img", "two.nii.gz"):
        assert np.array_equal(load_volume(path.with_name(name), GRID).array, volume.array), name
    with pytest.raises(VolumeError, match="nilearn or TorchIO, not int"):
        Volume.from_image(3)
    with pytest.raises(VolumeError, match="one channel, found 2"):
        Volume.from_image(tio.ScalarImage(tensor=np.zeros((2, 3, 3, 3), np.float32)))


def test_volume_computes_as_its_array(volume):
    array = volume.array
    for result, expected in ((volume * 2, array * 2), (1 - volume, 1 - array), (volume > 0.5, array > 0.5), (np.abs(volume), np.abs(array)),
                             (volume[3], array[3]), (np.stack([volume, volume]), np.stack([array, array])), (volume.ravel(), array.ravel())):
        assert type(result) is np.ndarray and np.array_equal(result, expected)
    assert volume.sum() == array.sum() and np.asarray(volume) is array
    assert not hasattr(volume, "nonsense")


def write_packed(path: Path, *parts: bytes) -> Path:
    "A file of several gzip members."
    path.write_bytes(b"".join(map(gzip.compress, parts)))
    return path


def test_packed_files(path, volume, tmp_path):
    whole = gzip.decompress(path.read_bytes())
    assert np.array_equal(load_volume(write_packed(tmp_path / "members.nii.gz", whole[:5000], whole[5000:]), GRID), volume)
    with pytest.raises(VolumeError, match="900000 bytes where the header"):
        load_volume(write_packed(tmp_path / "short.nii.gz", whole[:900_000]), GRID)
    (tmp_path / "cut.nii.gz").write_bytes(path.read_bytes()[:-20])
    with pytest.raises(VolumeError, match="it ends after"):
        load_volume(tmp_path / "cut.nii.gz", GRID)


def test_scaled_bytes_are_read_alike_packed_or_not(path, volume, tmp_path):
    header = nib.load(path).header.copy()
    header.set_data_dtype(np.uint8)  # as SPM and CAT12 may write: bytes with a slope and an intercept
    scaled = nib.Nifti1Image(GRID.pad(volume.array), GRID.affine, header)
    for name in ("scaled.nii.gz", "scaled.nii"):
        nib.save(scaled, tmp_path / name)
    assert nib.load(tmp_path / name).dataobj.slope != 1
    packed, plain = (load_volume(tmp_path / name, GRID) for name in ("scaled.nii.gz", "scaled.nii"))
    assert np.array_equal(packed, plain) and np.allclose(plain, volume, atol=0.003)


def test_map_may_be_zero_and_names_end_in_nii(volume, tmp_path):
    empty = save_volume(np.zeros_like(volume.array), tmp_path / "empty.nii", GRID)
    assert not load_map(empty, GRID).any()
    with pytest.raises(VolumeError, match=r"\.nii or \.nii\.gz"):
        volume.save(tmp_path / "x.png")


def test_message_names_the_grid_that_a_file_is_on(tmp_path):
    "Failed before: the message showed two matrices only."
    fine = get_grid("cat12_1.5mm")
    path = save_volume(np.ones(fine.cropped_shape, np.float32), tmp_path / "mwp1.nii", fine)
    for attempt in (lambda: check_volume(path, GRID), lambda: load_volume(path, GRID)):
        with pytest.raises(VolumeError, match=r"mwp1\.nii: not on the grid 'mni_3mm', but on 'cat12_1\.5mm'"):
            attempt()


@pytest.mark.parametrize("name, fields, message", [
    ("sform of zeros", {"sform_code": b"\1\0", "sform": bytes(48)}, "no position in space"),
    ("sform of NaN", {"sform_code": b"\1\0", "sform": np.full(12, np.nan, np.float32).tobytes()}, "no position in space"),
    ("binary voxels", {"datatype": b"\1\0"}, "readable NIfTI|number in each voxel|bits"),
    ("unknown type", {"datatype": b"\xff\x7f"}, "readable NIfTI"),
    ("complex", {"datatype": b"\x20\0"}, "a number in each voxel"),
    ("no codes", {"sform_code": b"\0\0", "qform_code": b"\0\0"}, "left and right cannot be told apart"),
])
def test_header_without_sense_is_refused_with_its_file(path, name, fields, message):
    "Failed before: an error of nibabel or NumPy without the file's name, or none."
    bad = edited(path, f"{name}.nii.gz", **fields)
    for attempt in (lambda: check_volume(bad, GRID), lambda: load_volume(bad, GRID), lambda: Grid.from_image(bad)):
        with pytest.raises(VolumeError, match=message) as caught:
            attempt()
        assert str(bad) in str(caught.value)


def test_sform_and_qform_that_contradict_each_other_are_refused(volume, tmp_path):
    "Failed before: the sform was taken, whatever the qform said of left and right."
    image = volume.to_image()
    image.set_qform(np.diag([-1, 1, 1, 1]) @ image.affine, code="mni")
    nib.save(image, tmp_path / "two.nii")
    with pytest.raises(VolumeError, match="LAS by its qform"):
        check_volume(tmp_path / "two.nii", GRID)


def test_colours_are_refused_at_the_check(tmp_path):
    "Failed before: accepted by the check, and an error of NumPy while training."
    colour = np.zeros(GRID.shape, [("R", "u1"), ("G", "u1"), ("B", "u1")])
    nib.save(nib.Nifti1Image(colour, GRID.affine), tmp_path / "rgb.nii")
    with pytest.raises(VolumeError, match="rgb.nii: expected a number in each voxel"):
        check_volume(tmp_path / "rgb.nii", GRID)


def test_nan_as_background_is_read_as_zero_with_a_note(volume, tmp_path):
    "Failed before: refused. NaN inside, and infinity, still are."
    values = GRID.pad(volume.array)
    background = np.ones(GRID.shape, bool)
    background[10:40, 10:50, 10:40] = False
    values[background] = np.nan
    nib.save(nib.Nifti1Image(values, GRID.affine), tmp_path / "spm.nii.gz")
    read = load_volume(tmp_path / "spm.nii.gz", GRID)
    assert np.array_equal(read, np.where(GRID.crop(background), 0, volume))
    assert f"{background.sum()} of" in read.notes[0] and "read as 0" in read.notes[0]
    for wrong, where in ((np.nan, (20, 20, 20)), (np.inf, (0, 0, 0))):
        bad = GRID.pad(volume.array)
        bad[where] = wrong
        nib.save(nib.Nifti1Image(bad, GRID.affine), tmp_path / "bad.nii.gz")
        with pytest.raises(VolumeError, match="1 of .* NaN or infinite"):
            load_volume(tmp_path / "bad.nii.gz", GRID)


def test_small_file_that_announces_much_is_refused_before_it_is_unpacked(path, tmp_path):
    "Failed before: 3 MB were unpacked to gigabytes, or memory was asked for by the header's word."
    bomb = tmp_path / "bomb.nii.gz"
    bomb.write_bytes(gzip.compress(gzip.decompress(path.read_bytes()) + bytes(30_000_000), 9))
    with pytest.raises(VolumeError, match="more content than"):
        load_volume(bomb, GRID)
    header = nib.Nifti1Header()
    header.set_data_shape((30000, 30000, 30000))
    header.set_sform(GRID.affine, code=1)
    header["vox_offset"], header["magic"] = 352, b"n+1"
    for name, pack in (("large.nii", bytes), ("large.nii.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(header.binaryblock + bytes(1000)))
        with pytest.raises(VolumeError, match="announces 27000000 million voxels"):
            load_volume(tmp_path / name)


def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.nii")
    with pytest.raises(VolumeError, match="this is not a file"):
        load_volume(tmp_path / "pipe.nii", GRID)


def test_cut_file_is_seen_at_the_check(path, volume, tmp_path):
    "Failed before, where the file is not compressed: the header alone was looked at."
    plain = volume.save(tmp_path / "plain.nii")
    plain.write_bytes(plain.read_bytes()[:20_000])
    with pytest.raises(VolumeError, match="plain.nii: the file is damaged or cut short"):
        check_volume(plain, GRID)


def test_note_on_a_background_of_nan_is_logged_while_a_cohort_is_read(volume, tmp_path, caplog):
    values = GRID.pad(volume.array)
    values[:3] = values[-3:] = np.nan
    for name in "ab":
        nib.save(nib.Nifti1Image(values, GRID.affine), tmp_path / f"{name}.nii")
    load_volumes(pd.DataFrame({"path": [str(tmp_path / f"{name}.nii") for name in "ab"]}), GRID)
    assert "are read as 0. So it is with 1 other scans" in caplog.text


def test_header_extension_without_end_is_not_read(path, tmp_path):
    "Failed before: gigabytes were unpacked before the header had been looked at."
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[348:360] = b"\1\0\0\0" + (2**31 - 16).to_bytes(4, "little") + b"\0\0\0\0"
    (tmp_path / "extension.nii.gz").write_bytes(gzip.compress(bytes(content) + bytes(100_000_000), 1))
    with pytest.raises(VolumeError, match="header extension of 2147483632 bytes"):
        check_volume(tmp_path / "extension.nii.gz", GRID)


def test_scans_unlike_those_that_the_model_knows_are_named(tmp_path, caplog):
    "Failed before: a residual map like any other, and a prediction of 1.0."
    rng, table = np.random.default_rng(0), pd.DataFrame({"path": [f"{number}.nii" for number in range(8)], "age": range(60, 68)})
    maps = rng.random((8, 5, 6, 7), np.float32)
    model = ResidualModel(["age"]).fit(maps, table)
    residual_maps(maps.copy(), table, GRID, model)
    assert not caplog.text
    maps[3] *= 255
    maps[5] *= 1e38
    residual_maps(maps, table, GRID, model)
    assert "3.nii: Its mean is" in caplog.text and "So it is with 1 other scans" in caplog.text
