"""Wrong inputs to `evaluate`: one line, exit code 2, and no line added to `evaluations.jsonl`."""

import pytest

CASES = [
    ("evaluate", "required: RUN", "jaxdiff evaluate --help"),
    ("evaluate {run} --metric frechet", "no option --metric", "did you mean '--metrics'?"),
    ("evaluate {run} --out a.png", "jaxdiff evaluate has no option --out"),
    ("evaluate {run} --inception nothing.pth", "nothing.pth: is not there", "check the path"),
    ("compare {run} --inception {run}/run.json", "is JSON without a weight_map", "give a weight file"),
    ("evaluate {run} --metrics frechet,acuracy", "unknown metric 'acuracy'", "did you mean 'accuracy'?"),
    ("evaluate {run} --metrics fid", "unknown metric 'fid'", "choose from: frechet, kernel"),
    ("evaluate {run} --metrics ,", "--metrics is empty", "leave it out for the usual ones"),
    ("evaluate {run} --num 0", "--num: expected a whole number of at least 1, got '0'"),
    ("evaluate {run} --num many", "--num: expected a whole number of at least 1, got 'many'"),
    ("evaluate {run} --num 1", "metrics need at least 2 samples, got 1", "--num"),
    ("evaluate {run} --num 3 --metrics precision", "metric precision cannot judge 3 samples", "more with --num"),
    ("evaluate {plain} --metrics accuracy", "metric accuracy needs labels, but this experiment has no classes"),
    ("evaluate {plain}", "metric accuracy needs labels", "leave accuracy out of --metrics"),
    ("evaluate {plain} --metrics frechet --guidance 2", "--guidance needs classes, digits_mlp has none"),
    ("evaluate {toyrun}", "toy_ddpm names nothing to evaluate against", "evaluation=Evaluation(...)"),
    ("evaluate {run} --steps 0", "--steps: expected a whole number of at least 1"),
    ("evaluate {run} --steps 99", "with 99 steps", "1 to 12, the length of the chain, got 99"),
    ("evaluate {run} --solver hein", "unknown solver 'hein'", "did you mean 'heun'?"),
    ("evaluate {run} --solver heun --eta 0.5", "--eta has no effect on solver heun"),
    ("evaluate {run} --class 11", "class must be 0 to 9, got 11"),
    ("evaluate {run} --ema fast", "no EMA 'fast'", "choose from: slow, slower, raw"),
    ("evaluate {run} --seed x", "--seed: expected a whole number from 0 to 4294967295"),
    ("evaluate {run} --batch-size -2", "--batch-size: expected a whole number of at least 1, got '-2'"),
    ("evaluate {tmp}", "is not a run: it has no run.json"),
    ("evaluate {tmp}/none", "run folder {tmp}/none does not exist"),
    ("evaluate {unstarted}", "has no checkpoint yet"),
    ("evaluate {torn_record}", "run.json is damaged"),
    ("evaluate {other_settings}", "config.lr is 0.001 there and 0.5 here"),
    ("evaluate {damaged}", "none can be read"),
]


@pytest.mark.parametrize("case", CASES, ids=[case[0] for case in CASES])
def test_evaluate_refuses(refused, case):
    refused(*case)
