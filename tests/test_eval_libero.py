"""eval_libero.py: the same starts for every policy, resume, errors."""

import dataclasses
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from test_readme import commands

import eval_libero
from vlarft.policy import VLAPolicy
from vlarft.run.config import parse
from vlarft.sim import policy_check, suites
from vlarft.sim.evaluate import ReplayActor, chunk_noise

SMOKE = eval_libero.PRESETS["smoke"]


@pytest.fixture()
def config(policy_file, tmp_path):
    return dataclasses.replace(SMOKE, policies=(str(policy_file),), workers=0, out_dir=str(tmp_path / "eval"))


@pytest.fixture()
def other_policy(policy_file, tmp_path):
    policy = VLAPolicy.load(policy_file)
    torch.nn.init.zeros_(policy.head.output.weight)
    policy.save(tmp_path / "other.safetensors")
    return str(tmp_path / "other.safetensors")


def records(config):
    return [json.loads(line) for line in (Path(config.out_dir) / "episodes.jsonl").read_text().splitlines()]


def test_the_commands_of_the_docstring_write_folders_of_their_own():
    words = [words for _, words in commands(f"```\n{eval_libero.__doc__}\n```")]
    parsed = [parse(eval_libero.Config, eval_libero.PRESETS, own, "") for own in words]
    assert len({cfg.out_dir for cfg in parsed}) == len(parsed) > 2


def test_results_and_pairing(config, other_policy, capsys):
    config = dataclasses.replace(config, policies=(*config.policies, other_policy), animate=1)
    results = eval_libero.main(config)
    first, second = results["policies"]
    assert first["all"]["episodes"] == second["all"]["episodes"] == 2
    assert "against_first" not in first and second["against_first"]["difference"] == pytest.approx(
        second["all"]["rate"] - first["all"]["rate"]
    )
    starts = [(r["task"], r["init_state"]) for r in records(config)]
    assert sorted(starts) == [(0, 0), (0, 0), (0, 1), (0, 1)]
    assert all(r["success"] or r["steps"] == config.horizon == 64 for r in records(config))
    assert json.loads((Path(config.out_dir) / "results.json").read_text()) == json.loads(json.dumps(results))
    assert len(list(Path(config.out_dir).glob("policy*.gif"))) == 2
    printed = capsys.readouterr().out
    assert "[0.0, 65.8]  0/2" in printed  # Wilson's interval of 0 of 2
    assert "an episode ends after 64 actions, if the suite's limit is not below" in printed
    whole = dataclasses.replace(config, policies=("random",), horizon=None, out_dir=config.out_dir + "_whole")
    eval_libero.main(whole)
    assert [r["steps"] for r in records(whole)] == [180] * 2  # the suite's limit
    assert "an episode ends after" not in capsys.readouterr().out


def test_a_task_without_demonstrations_is_named(config, policy_file, tmp_path, recwarn):
    policy, known = VLAPolicy.load(policy_file), "pick up the red block and place it in the bin"
    for number, instructions in enumerate(([known.upper()], [known.replace("red", "clear")])):
        policy.save(tmp_path / f"{number}.safetensors", {"instructions": instructions})
    eval_libero.check(dataclasses.replace(config, policies=(*config.policies, str(tmp_path / "0.safetensors"))))
    assert not recwarn.list  # of a file that does not tell, nothing is known
    one, two = (dataclasses.replace(config, policies=(str(tmp_path / f"{i}.safetensors"),)) for i in (0, 1))
    with pytest.warns(UserWarning, match="was not trained on 1 of the tasks of tabletop_object, for example 'pick up"):
        eval_libero.check(dataclasses.replace(one, tasks=("0", "1")))
    with pytest.raises(
        ValueError, match="trained on no demonstrations of tabletop_object, for example not on 'pick up"
    ):
        eval_libero.check(two)


def test_another_rendering_than_in_training_is_named(config, policy_file, tmp_path, recwarn):
    policy = VLAPolicy.load(policy_file)
    for fast in (True, False, None):
        policy.save(tmp_path / f"{fast}.safetensors", {"fast_rendering": fast})
    libero = dataclasses.replace(config, suites=("libero_object",))
    for fast in (True, False):
        path = str(tmp_path / f"{not fast}.safetensors")
        with pytest.warns(UserWarning, match=f"give --{'no-' if fast else ''}fast-rendering"):
            eval_libero.check(dataclasses.replace(libero, policies=(path,), fast_rendering=fast))
    recwarn.clear()
    eval_libero.check(dataclasses.replace(libero, policies=(str(tmp_path / "None.safetensors"),)))
    eval_libero.check(dataclasses.replace(config, policies=(str(tmp_path / "True.safetensors"),)))  # Tabletop has none
    assert not recwarn.list


def test_other_meshes_or_another_image_size_than_in_training_are_named(config, policy_file, tmp_path, monkeypatch):
    policy, path = VLAPolicy.load(policy_file), str(tmp_path / "policy.safetensors")
    policy.save(path, {"visuals": "stand-in visuals", "image_size": [64, 64]})
    libero = dataclasses.replace(config, suites=("libero_object",), policies=(path,), image_size=64)
    monkeypatch.setattr(policy_check, "visuals_of", lambda suite: "own visuals")
    with pytest.warns(UserWarning, match="was trained on images of stand-in visuals, and plays with own visuals"):
        eval_libero.check(libero)
    monkeypatch.setattr(policy_check, "visuals_of", lambda suite: "stand-in visuals")
    with pytest.warns(UserWarning, match="trained on images of 64x64 and plays with 256x256, .*: give --image-size 64"):
        eval_libero.check(dataclasses.replace(libero, image_size=256))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eval_libero.check(libero)
        eval_libero.check(dataclasses.replace(libero, image_size=None))  # its own, which is 64 as well


def test_a_missing_simulator_is_said_before_anything_is_written(config, monkeypatch, tmp_path):
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path / "nothing"))
    monkeypatch.setattr(suites, "package_folder", lambda: tmp_path)  # as if LIBERO were installed
    with pytest.raises(FileNotFoundError, match="LIBERO's assets are not at LIBERO_ASSETS=.*: no folder articulated"):
        eval_libero.main(dataclasses.replace(config, suites=("libero_object",)))

    def missing():
        raise ImportError("LIBERO is missing")

    monkeypatch.setattr(suites, "package_folder", missing)
    with pytest.raises(ImportError, match="LIBERO is missing"):
        eval_libero.main(dataclasses.replace(config, suites=("libero_object",)))
    assert not Path(config.out_dir).exists()


def test_episodes_do_not_depend_on_their_company(config, tmp_path):
    eval_libero.main(config)
    alone = dataclasses.replace(config, batch_size=1, out_dir=str(tmp_path / "alone"))
    eval_libero.main(alone)
    for a, b in zip(*(sorted(records(c), key=lambda r: r["init_state"]) for c in (config, alone)), strict=True):
        # one chunk is enough: float rounding differs between batch sizes, and a simulator amplifies it
        torch.testing.assert_close(torch.tensor(a["actions"][:8]), torch.tensor(b["actions"][:8]), atol=1e-3, rtol=0)


def test_worker_processes_play_the_same(config, tmp_path):
    eval_libero.main(config)
    parallel = dataclasses.replace(config, workers=1, out_dir=str(tmp_path / "parallel"))
    eval_libero.main(parallel)
    assert [r["actions"] for r in records(config)] == [r["actions"] for r in records(parallel)]


def test_no_more_workers_than_the_gpu_has_room_for(config, monkeypatch, capsys):
    config = dataclasses.replace(config, workers=64)
    assert eval_libero.workers_of(config) == 64
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (5 << 30, 8 << 30))
    assert eval_libero.workers_of(config) == 4 and "4 workers in place of 64" in capsys.readouterr().err
    assert eval_libero.workers_of(dataclasses.replace(config, workers=0)) == 0


def test_interrupted_evaluation_goes_on(config, monkeypatch, capsys):
    config = dataclasses.replace(config, batch_size=1)
    real, calls = eval_libero.play, []

    def stop_at_the_second(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(eval_libero, "play", stop_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        eval_libero.main(config)
    assert len(records(config)) == 1
    with (Path(config.out_dir) / "episodes.jsonl").open("a") as file:
        file.write('[1]\n{"policy": "x"}\n{"policy": "cut sho')
    results = eval_libero.main(config)
    assert [c[-1] for c in calls] == [[0], [1], [1]]  # state 0 is not played again
    assert results["policies"][0]["all"]["episodes"] == 2 and len(records(config)) == 2
    assert "episodes.jsonl: 3 lines are no episodes" in capsys.readouterr().err


def test_episodes_with_other_meshes_do_not_mix(config, monkeypatch):
    eval_libero.main(config)
    log, (first, _) = Path(config.out_dir) / "episodes.jsonl", records(config)
    log.write_text(json.dumps({**first, "visuals": "stand-in visuals"}) + "\n")
    monkeypatch.setattr(eval_libero, "visuals_of", lambda suite, **_: "own visuals")
    before, message = (
        log.read_bytes(),
        "object with stand-in visuals, the others would be played with own visuals: give",
    )
    with pytest.raises(ValueError, match=message):
        eval_libero.main(config)
    assert log.read_bytes() == before
    monkeypatch.setattr(eval_libero, "visuals_of", lambda suite, **_: "stand-in visuals")
    eval_libero.main(config)
    assert len(records(config)) == 2

    def gone(suite, **_):
        raise FileNotFoundError("no assets")

    monkeypatch.setattr(eval_libero, "visuals_of", gone)  # nothing is left to render: nothing is asked
    assert eval_libero.main(config)["policies"][0]["all"]["episodes"] == 2


def test_a_run_folder_is_its_checkpoint(config, policy_file, monkeypatch):
    monkeypatch.chdir(policy_file.parent)
    config = dataclasses.replace(config, episodes=1)
    eval_libero.main(dataclasses.replace(config, policies=("./model.safetensors",)))
    monkeypatch.setattr(eval_libero, "play", lambda *args: pytest.fail("played again"))
    folder = str(policy_file.parent)
    results = eval_libero.main(dataclasses.replace(config, policies=(folder,)))
    assert results["policies"][0]["policy"] == folder and results["policies"][0]["all"]["episodes"] == 1
    with pytest.raises(ValueError, match="policies name a checkpoint twice"):
        eval_libero.main(dataclasses.replace(config, policies=(folder, str(policy_file))))


def test_a_policy_is_known_by_its_tensors(config, policy_file, tmp_path, monkeypatch):
    """Not by its file, which an equal run writes with other paths in it, nor by the digest that older versions took."""
    path, policy = tmp_path / "model.safetensors", VLAPolicy.load(policy_file)
    policy.save(path, {"out_dir": "here"})
    config = dataclasses.replace(config, policies=(str(path),), episodes=1)
    eval_libero.main(config)
    (record,) = records(config)
    policy.save(path, {"out_dir": "there"})
    monkeypatch.setattr(eval_libero, "play", lambda *args: pytest.fail("played again"))
    eval_libero.main(config)
    older = json.dumps({**record, "digest": eval_libero.file_digest(path)})
    (Path(config.out_dir) / "episodes.jsonl").write_text(older + "\n")
    eval_libero.main(config)
    assert records(config) == [record]


def test_played_episodes_outlive_a_kill_at_the_start(config, monkeypatch):
    eval_libero.main(config)
    log = Path(config.out_dir) / "episodes.jsonl"
    log.write_text(log.read_text() + '{"cut')
    before = log.read_bytes()

    def killed(*paths):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", killed)
        eval_libero.earlier_records(config, eval_libero.check(config))
    assert log.read_bytes() == before and len(eval_libero.earlier_records(config, eval_libero.check(config))) == 2


def test_a_changed_checkpoint_is_played_again(config, policy_file, tmp_path, capsys):
    path = tmp_path / "model.safetensors"
    policy = VLAPolicy.load(policy_file)
    policy.save(path)
    config = dataclasses.replace(config, policies=(str(path),), episodes=1, animate=1, animate_size=16)
    eval_libero.main(config)
    stale = Path(config.out_dir) / "policy0_tabletop_object_0_0_success.gif"
    stale.touch()
    torch.nn.init.zeros_(policy.head.output.weight)
    policy.save(path)
    before = records(config)
    eval_libero.main(config)
    assert len(records(config)) == 1 and records(config)[0]["digest"] != before[0]["digest"]
    assert "1 episodes of policies that have changed since are played again" in capsys.readouterr().err
    assert not stale.exists() and len(list(Path(config.out_dir).glob("policy0_*.gif"))) == 1  # of this policy alone


def test_noise_depends_on_the_start_alone():
    noise = [chunk_noise("sampled", (8, 7), 0, "s", 0, state, chunk) for state in (0, 1) for chunk in (0, 1)]
    assert len({n.sum().item() for n in noise}) == 4
    assert torch.equal(noise[3], chunk_noise("sampled", (8, 7), 0, "s", 0, 1, 1))
    assert chunk_noise("zero", (8, 7), 0, "s", 0, 1, 1).abs().max() == 0
    gripper = chunk_noise("gripper", (8, 7), 0, "s", 0, 1, 1)
    assert gripper[:, :6].abs().max() == 0 and torch.equal(gripper[:, 6], noise[3][:, 6])


def test_perturbed_and_replanning(config):
    config = dataclasses.replace(config, perturb="object:2.5", execute=4, noise="zero", num_flow_steps=5, episodes=1)
    results = eval_libero.main(config)
    assert results["config"]["perturb"] == "object:2.5"
    assert "rejected_starts" in records(config)[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suites": ("tabletop_kitchen",)}, "unknown suite 'tabletop_kitchen'; the suites are"),
        ({"tasks": ("fly",)}, "unknown task 'fly' of tabletop_object; give 0..9"),
        ({"tasks": ("99",)}, "unknown task '99'"),
        ({"suites": ("tabletop_object",) * 2}, "suites names tabletop_object twice"),
        ({"execute": 9}, "execute must lie in 1..8"),
        ({"world_model": "runs/wm"}, "--world-model and --success-model choose among chunks, but --plan is 1"),
        ({"perturb": "wind:3"}, "perturbation 'wind:3' is not one of"),
    ],
)
def test_bad_input(config, changes, message):
    with pytest.raises(ValueError, match=message):
        eval_libero.main(dataclasses.replace(config, **changes))


def test_a_task_that_is_named_twice_is_played_once(config):
    name = suites.task_names("tabletop_object")[0]
    eval_libero.main(dataclasses.replace(config, tasks=("0", name, "0"), episodes=1))
    assert [(r["task"], r["init_state"]) for r in records(config)] == [(0, 0)]


def test_bad_checkpoints(config, world_model_file, tmp_path):
    def run(*policies):
        eval_libero.main(dataclasses.replace(config, policies=policies))

    with pytest.raises(FileNotFoundError, match="no checkpoint at"):
        run(str(tmp_path / "none"))
    with pytest.raises(ValueError, match="holds a WorldModel, expected a VLAPolicy"):
        run(str(world_model_file))
    with pytest.raises(ValueError, match="name a checkpoint twice"):
        run(config.policies[0], config.policies[0])
    (tmp_path / "cut.safetensors").write_bytes(Path(config.policies[0]).read_bytes()[:1000])
    with pytest.raises(ValueError, match="truncated"):
        run(str(tmp_path / "cut.safetensors"))


def test_the_stochastic_policy_can_be_evaluated(config, policy_file, tmp_path):
    with pytest.raises(ValueError, match="noise stochastic: .* has no sigma net, which train_rft.py adds"):
        eval_libero.main(dataclasses.replace(config, noise="stochastic"))
    policy, first = VLAPolicy.load(policy_file), {}
    policy.add_sigma_net()
    policy.save(tmp_path / "rft.safetensors")
    for noise in ("sampled", "stochastic"):
        changes = {
            "policies": (str(tmp_path / "rft.safetensors"),),
            "noise": noise,
            "episodes": 1,
            "num_flow_steps": 10,
        }
        run = dataclasses.replace(config, **changes, out_dir=str(tmp_path / noise))
        eval_libero.main(run)
        first[noise] = torch.tensor(records(run)[0]["actions"][:8])
    assert not torch.equal(first["sampled"], first["stochastic"])
    with pytest.raises(ValueError, match="was fine-tuned with 10 flow steps, --num-flow-steps is 4; its sigma net"):
        eval_libero.main(dataclasses.replace(run, num_flow_steps=4, out_dir=str(tmp_path / "four")))


@pytest.mark.parametrize("execute", [3, 8])
def test_a_recording_leaves_no_action_out(execute):
    recorded = [[0.1 * i] * 6 + [1.0] for i in range(11)]
    actor, played = ReplayActor({5: recorded}, execute), []
    for chunk in range(5):
        played += actor([5], chunk, [None])[0][:execute].tolist()
    np.testing.assert_allclose(played[:11], recorded, atol=1e-6)
    assert all(action == [0.0] * 6 + [1.0] for action in played[11:]) and len(played) == 5 * execute


def test_recordings_play_again_beside_chance_and_failures_are_filmed(config, tmp_path, capsys):
    eval_libero.main(config)
    recording = str(Path(config.out_dir) / "episodes.jsonl")
    again = dataclasses.replace(
        config,
        policies=(recording, "random"),
        animate_failed=1,
        animate_starts=("tabletop_object/0/1",),
        out_dir=str(tmp_path / "again"),
    )
    results = eval_libero.main(again)
    assert [r["actions"] for r in records(again) if r["policy"] == recording] == [r["actions"] for r in records(config)]
    assert "against_first" in results["policies"][1]["suites"]["tabletop_object"]
    assert "McNemar p" in capsys.readouterr().out
    films = {path.name for path in Path(again.out_dir).glob("*.gif")}
    assert films == {f"policy{p}_tabletop_object_0_{s}_failure.gif" for p in (0, 1) for s in (0, 1)}
    with pytest.raises(ValueError, match="has no episode of tabletop_object, task 1, initial state 0"):
        eval_libero.main(dataclasses.replace(again, tasks=("1",), animate_starts=(), out_dir=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="animate_starts: no episode tabletop_object/3/0 is played"):
        eval_libero.main(dataclasses.replace(again, animate_starts=("tabletop_object/3/0",)))
    with pytest.raises(ValueError, match=r"execute must lie in 1..8"):
        eval_libero.main(dataclasses.replace(again, execute=9, out_dir=str(tmp_path / "c")))
    both = dataclasses.replace(again, policies=(str(Path(again.out_dir) / "episodes.jsonl"),))
    with pytest.raises(ValueError, match="holds episodes of 2 policies, .*episodes.jsonl, random: keep the lines of"):
        eval_libero.main(dataclasses.replace(both, out_dir=str(tmp_path / "both")))
    (tmp_path / "bad.jsonl").write_text('{"suite": 1}\n')
    with pytest.raises(ValueError, match=r"bad.jsonl, line 1: not a record of an episode"):
        eval_libero.main(
            dataclasses.replace(again, policies=(str(tmp_path / "bad.jsonl"),), out_dir=str(tmp_path / "b"))
        )


def test_a_recording_of_other_starts_is_named(config, tmp_path):
    config = dataclasses.replace(config, perturb="object:2.5", episodes=1)
    eval_libero.main(config)
    recording = dataclasses.replace(config, policies=(str(Path(config.out_dir) / "episodes.jsonl"),))
    with pytest.warns(
        UserWarning, match="jsonl was recorded with --perturb object:2.5, this run has none: its actions"
    ):
        eval_libero.check(dataclasses.replace(recording, perturb=None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        eval_libero.check(recording)
        (Path(config.out_dir) / "config.json").unlink()  # of a file that was taken elsewhere
        eval_libero.check(dataclasses.replace(recording, perturb=None))


@pytest.mark.parametrize(("animate_format", "package"), [("gif", "PIL"), ("mp4", "av")])
def test_what_films_need_is_asked_for_before_the_first_episode(config, monkeypatch, animate_format, package):
    monkeypatch.setattr(eval_libero, "play", lambda *_: pytest.fail("played"))
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="pip install"):
        eval_libero.main(dataclasses.replace(config, animate=1, animate_format=animate_format))
    assert not Path(config.out_dir).exists()


def test_the_table_comes_before_the_films(config, monkeypatch, capsys):
    monkeypatch.setattr(eval_libero, "film", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        eval_libero.main(config)
    assert "/2" in capsys.readouterr().out


def test_a_dead_worker_is_reported(config, monkeypatch, capsys):
    def died_once(function, jobs, workers, start):
        yield from ((job, function(*job), 1) for job in jobs)

    monkeypatch.setattr(eval_libero, "run_jobs", died_once)
    assert eval_libero.main(config)["played_again"] == 2
    assert "2 episodes were played again, since a worker process died" in capsys.readouterr().out


def test_mp4_needs_pyav(config, monkeypatch, tmp_path):
    from vlarft.run.pictures import save_mp4

    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ImportError, match=r'pip install -e "\.\[video\]"'):
        save_mp4(tmp_path / "film.mp4", [])


def test_mp4_frames_come_back(tmp_path):
    av = pytest.importorskip("av")
    import numpy as np

    from vlarft.run.pictures import save_mp4

    frames = [np.full((33, 48, 3), 40 * i, np.uint8) for i in range(5)]
    save_mp4(tmp_path / "film.mp4", frames, frames_per_second=10)
    with av.open(str(tmp_path / "film.mp4")) as file:
        read = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(read) == 5 and read[0].shape == (32, 48, 3)
    assert [abs(int(frame.mean()) - 40 * i) < 6 for i, frame in enumerate(read)] == [True] * 5
