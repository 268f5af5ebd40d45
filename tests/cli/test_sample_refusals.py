"""Wrong inputs to `sample`, and to `compare` and `evaluate` where they share options: one line, code 2, no file."""

import pytest

SAMPLE = [
    ("sample {run} --out {tmp}/a.png --stps 3", "no option --stps", "did you mean '--steps'?"),
    ("sample {run}", "required: --out", "jaxdiff sample --help"),
    ("sample --out {tmp}/a.png", "required: RUN"),
    ("sample {run} {run} --out {tmp}/a.png", "no use for '{run}'"),
    ("sample {run} --out {tmp}/a.png --num ten", "--num: expected a whole number of at least 1, got 'ten'"),
    ("sample {run} --out {tmp}/a.png --num 0", "--num: expected a whole number of at least 1, got '0'"),
    ("sample {run} --out {tmp}/a.png --num 2.5", "expected a whole number of at least 1, got '2.5'"),
    ("sample {run} --out {tmp}/a.png --steps 0", "--steps: expected a whole number of at least 1, got '0'"),
    ("sample {run} --out {tmp}/a.png --steps -4", "--steps: expected a whole number of at least 1, got '-4'"),
    ("sample {run} --out {tmp}/a.png --steps 13", "with 13 steps", "1 to 12, the length of the chain, got 13"),
    ("sample {run} --out {tmp}/a.png --batch-size 0", "--batch-size: expected a whole number", "got '0'"),
    ("sample {run} --out {tmp}/a.png --seed -1", "--seed: expected a whole number from 0 to 4294967295, got '-1'"),
    ("sample {run} --out {tmp}/a.png --seed 4294967296", "from 0 to 4294967295, got '4294967296'"),
    ("sample {run} --out {tmp}/a.png --guidance nan", "--guidance: expected a finite number, got 'nan'"),
    ("sample {run} --out {tmp}/a.png --guidance high", "--guidance: expected a finite number, got 'high'"),
    ("sample {toyrun} --out {tmp}/a.png --guidance 2", "--guidance needs classes, toy_ddpm has none", "leave"),
    ("sample {run} --out {tmp}/a.png --solver ddmi", "unknown solver 'ddmi'", "did you mean 'ddim'?"),
    ("sample {run} --out {tmp}/a.png --solver xyz", "unknown solver 'xyz'", "choose from: ancestral, ddim"),
    ("sample {run} --out {tmp}/a.png --solver dpmpp_2s", "the usual number of steps and solver dpmpp_2s", "--steps"),
    ("sample {run} --out {tmp}/a.png --solver ddim --eta 1.5", "--eta: expected a number from 0 to 1, got '1.5'"),
    ("sample {run} --out {tmp}/a.png --solver heun --eta 1", "--eta has no effect on solver heun", "--solver ddim"),
    ("sample {run} --out {tmp}/a.png --eta 0.5", "no effect on the method's own solver", "--solver ddim"),
    ("sample {run} --out {tmp}/a.png --class 10", "class must be 0 to 9, got 10", "leave it out"),
    ("sample {run} --out {tmp}/a.png --class -1", "--class: expected a whole number of at least 0, got '-1'"),
    ("sample {toyrun} --out {tmp}/a.png --class 3", "class 3 was asked for", "no classes", "leave the class out"),
    ("sample {run} --out {tmp}/a.png --ema slwo", "no EMA 'slwo'", "did you mean 'slow'?"),
    ("sample {run} --out {tmp}/a.jpg", "--out {tmp}/a.jpg ends in '.jpg'", "expected .png, .npz or a folder"),
    ("sample {toyrun} --out {tmp}/points", "cannot hold examples of shape [2]", "use a name ending in .npz"),
    ("sample {run} --out {file}/grid.png", "{file} is not a writable folder", "choose another place"),
    ("sample {run} --out {run}", "{run} exists and is not empty", "--overwrite"),
    ("sample {run} --out {run} --overwrite", "{run} holds checkpoints, which is no sample"),
    ("sample {tmp}/nothing --out {tmp}/a.png", "run folder {tmp}/nothing does not exist", "jaxdiff train FILE"),
    ("sample {run}n --out {tmp}/a.png", "run folder {run}n does not exist", "did you mean '{run}'?"),
    ("sample {tmp} --out {tmp}/a.png", "is not a run: it has no run.json", "jaxdiff train FILE --workdir {tmp}"),
    ("sample {file} --out {tmp}/a.png", "{file} is a file, expected the folder of a run"),
    ("sample {torn_record} --out {tmp}/a.png", "run.json is damaged, expected JSON", "restore it"),
    ("sample {unstarted} --out {tmp}/a.png", "has no checkpoint yet", "jaxdiff train FILE --workdir {unstarted}"),
    ("sample {damaged} --out {tmp}/a.png", "run {damaged}: checkpoint 4", "none can be read (tried 4, 2)"),
    ("sample {other_settings} --out {tmp}/a.png", "config.lr is 0.001 there and 0.5 here", "use its settings"),
    ("sample {other_names} --out {tmp}/a.png", "digits_mlp.py has no setting 'depth'", "name its own file"),
    (
        "sample {other_types} --out {tmp}/a.png",
        "digits_mlp.py: build(...) failed with Type",
        "mend the file or its settings",
    ),
    ("sample {lost_file} --out {tmp}/a.png", "gone.py of run {lost_file} is gone", "--experiment FILE"),
    ("sample {inside} --out {tmp}/a.png", "names code inside the run folder", "--experiment"),
    ("sample {run} --out {tmp}/a.png --experiment {toy}", "toy_ddpm.py has no setting", "name its own file"),
    ("sample {run} --out {tmp}/a.png --experiment {tmp}/x.py", "experiment file {tmp}/x.py", "is gone"),
]
COMPARE = [
    ("compare {run} --steps 3", "jaxdiff compare has no option --steps"),
    ("compare {run} --solvers ddim,heum", "unknown solver 'heum'", "did you mean 'heun'?"),
    ("compare {run} --solvers ,", "--solvers is empty", "leave it out"),
    ("compare {run} --calls 4,0", "--calls takes whole numbers of at least 1, got '0'", "--calls 50,20,10,1"),
    ("compare {run} --calls 4;2", "--calls takes whole numbers of at least 1, got '4;2'"),
    ("compare {run} --calls 24 --solvers ddim", "with 24 steps and solver ddim", "1 to 12, the length of the chain"),
    ("compare {run} --num 1", "at least 2 samples, got 1", "--num"),
    ("compare {toyrun}", "toy_ddpm names nothing to evaluate against"),
    ("compare {plain}", "metric accuracy needs labels", "no classes", "--metrics"),
    ("compare {unstarted}", "has no checkpoint yet"),
]


@pytest.mark.parametrize("case", SAMPLE, ids=[case[0] for case in SAMPLE])
def test_sample_refuses(refused, case):
    refused(*case)


@pytest.mark.parametrize("case", COMPARE, ids=[case[0] for case in COMPARE])
def test_compare_refuses(refused, case):
    refused(*case)


def test_sample_keeps_what_exists(refused, tmp_path):
    grid, folder = tmp_path / "a.png", tmp_path / "folder"
    grid.write_bytes(b"mine")
    folder.mkdir()
    (folder / "000000.png").write_bytes(b"mine")
    refused("sample {run} --out {tmp}/a.png", "{tmp}/a.png exists", "--overwrite")
    refused("sample {run} --out {tmp}/folder", "{tmp}/folder exists and is not empty", "--overwrite")
    (folder / "notes.txt").write_text("mine")
    refused("sample {run} --out {tmp}/folder --overwrite", "holds notes.txt, which is no sample", "another folder")
    (tmp_path / "b.npz").mkdir()
    refused("sample {run} --out {tmp}/b.npz --overwrite", "b.npz exists and is a folder", "another name")
    (tmp_path / "plain").write_bytes(b"mine")
    refused("sample {run} --out {tmp}/plain --overwrite", "plain exists and is a file", "another name")
