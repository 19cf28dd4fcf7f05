"""collect_demos.py: layout, determinism, resume, marked failures, errors."""

import dataclasses
import json

import numpy as np
import pytest

import collect_demos
from collect_demos import FIRST_NOISY, PRESETS, main
from vlarft.data import load_episodes
from vlarft.policy import VLAPolicy
from vlarft.run.config import parse
from vlarft.run.random import generator
from vlarft.sim import SIMULATORS, make_env, task_names
from vlarft.sim.demonstrator import NoPlanError
from vlarft.sim.experts import Expert

pytest.importorskip("mujoco")
h5py = pytest.importorskip("h5py")


def config(folder, **changes):
    small = {"tasks": ("0", "2"), "demos_per_task": 2, "image_size": 16, "workers": 1, "idle_steps": 3}
    return dataclasses.replace(PRESETS["smoke"], out_dir=str(folder), **{**small, **changes})


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    folder = tmp_path_factory.mktemp("collected")
    return folder, main(config(folder))


def test_files_have_liberos_layout(collected):
    folder, paths = collected
    assert [path.name for path in paths] == [
        "pick_up_the_red_block_and_place_it_in_the_bin_demo.hdf5",
        "pick_up_the_blue_block_and_place_it_in_the_bin_demo.hdf5",
    ]
    assert sorted(path.name for path in (folder / "tabletop_object").iterdir()) == sorted(p.name for p in paths)
    with h5py.File(paths[1]) as file:
        data = file["data"]
        assert set(data) == {"demo_0", "demo_1"} and data.attrs["num_demos"] == 2
        assert json.loads(data.attrs["problem_info"])["language_instruction"].startswith("pick up the blue block")
        assert json.loads(data.attrs["env_args"])["collection"]["action_noise"] == 0.2
        for i in (0, 1):
            demo = data[f"demo_{i}"]
            steps = demo.attrs["num_samples"]
            assert demo["obs/agentview_rgb"].shape == (steps, 16, 16, 3)
            assert demo["obs/agentview_rgb"].compression == "gzip"
            assert demo["actions"].shape == demo["intended_actions"].shape == (steps, 7)
            assert demo.attrs["kind"] == "expert" and demo.attrs["success"] and demo.attrs["seed"] == i
            noise = demo["actions"][:] - demo["intended_actions"][:]
            assert noise[:-3, :3].std() > 0.1 and not noise[-3:].any()  # idle steps hold still
            np.testing.assert_array_equal(demo["actions"][-3:], [[0, 0, 0, 0, 0, 0, -1]] * 3)
        assert data.attrs["total"] == sum(data[name].attrs["num_samples"] for name in data)


def test_episodes_load_and_replay_bit_for_bit(collected):
    folder, _ = collected
    episodes = load_episodes(folder, with_states=True)
    assert len(episodes) == 4 and all(episode.success for episode in episodes)
    env = make_env("tabletop_object", 2, 16)
    episode = next(e for e in episodes if "blue" in e.instruction)
    env.reset(seed=0)
    for t in range(len(episode)):
        np.testing.assert_array_equal(env.get_state(), episode.states[t])
        if t % 10 == 0:
            np.testing.assert_array_equal(env.observe()["agentview"], episode.images[t])
            np.testing.assert_array_equal(env.proprio(), episode.proprio[t])
        env.step(episode.actions[t])
    assert env.success()


def test_an_interrupted_collection_goes_on_where_it_stopped(collected, tmp_path, monkeypatch):
    _, paths = collected
    made = []
    original = collect_demos.make_demo

    def stops_at_the_fourth(job):
        if len(made) == 3:
            raise KeyboardInterrupt
        made.append(job)
        return original(job)

    monkeypatch.setattr(collect_demos, "make_demo", stops_at_the_fourth)
    with pytest.raises(KeyboardInterrupt):
        main(config(tmp_path))
    monkeypatch.setattr(collect_demos, "make_demo", original)
    folder = tmp_path / "tabletop_object"
    blue = folder / f"{paths[1].stem}.parts"
    (blue / "demo_0.tmp").write_bytes(b"half a file")
    assert (folder / paths[0].name).exists() and not (folder / paths[1].name).exists()
    made.clear()
    monkeypatch.setattr(collect_demos, "make_demo", lambda job: made.append(job) or original(job))
    again = main(config(tmp_path))
    assert [(job.task, job.index) for job in made] == [(2, 1)]
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]
    assert not list(tmp_path.rglob("*.parts")) and not list(tmp_path.rglob("*.tmp"))


def test_files_do_not_depend_on_the_number_of_workers(collected, tmp_path):
    _, paths = collected
    again = main(config(tmp_path, workers=2))
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in paths]


def test_repeating_the_command_makes_nothing_and_more_demos_extend(collected, tmp_path, monkeypatch):
    settings = config(tmp_path, tasks=("0",), demos_per_task=1)
    (path,) = main(settings)
    first = path.read_bytes()
    monkeypatch.setattr(collect_demos, "make_demo", lambda job: pytest.fail("made again"))
    main(settings)
    assert path.read_bytes() == first
    monkeypatch.undo()
    main(dataclasses.replace(settings, demos_per_task=2, noisy_per_task=1))
    with h5py.File(path) as file, h5py.File(collected[1][0]) as whole:
        assert set(file["data"]) == {"demo_0", "demo_1", f"demo_{FIRST_NOISY}"}
        assert file["data"].attrs["num_demos"] == 3
        noisy = file[f"data/demo_{FIRST_NOISY}"]
        assert noisy.attrs["kind"] == "noisy"
        assert np.std(noisy["actions"][:, :3] - noisy["intended_actions"][:, :3]) > 0.3
        for name in ("demo_0", "demo_1"):
            np.testing.assert_array_equal(file[f"data/{name}/actions"], whole[f"data/{name}/actions"])


def test_settings_of_a_collection_that_made_nothing_may_change(tmp_path, monkeypatch):
    settings = config(tmp_path, tasks=("0",), demos_per_task=1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collect_demos, "make_demo", lambda job: (_ for _ in ()).throw(KeyboardInterrupt))
        main(settings)
    (path,) = main(dataclasses.replace(settings, seed=7))
    with h5py.File(path) as file:
        assert json.loads(file["data"].attrs["env_args"])["collection"]["seed"] == 7


@pytest.mark.parametrize("where", ["os.replace", "shutil.rmtree"])
def test_a_collection_killed_while_it_is_merged_goes_on(tmp_path, monkeypatch, where):
    """Before the file is moved into place, and after it, when all parts are in the file already."""
    settings = config(tmp_path, tasks=("0",), demos_per_task=1)
    (path,) = main(settings)
    first = path.read_bytes()
    more = dataclasses.replace(settings, demos_per_task=2)
    real = collect_demos.os.replace

    def killed(*paths, **options):
        if where == "shutil.rmtree" or paths[1] == path:
            raise KeyboardInterrupt
        real(*paths)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(f"collect_demos.{where}", killed)
        main(more)
    assert (path.read_bytes() == first) == (where == "os.replace")
    monkeypatch.setattr(collect_demos, "make_demo", lambda job: pytest.fail("made again"))
    main(more)
    with h5py.File(path) as file:
        assert list(file["data"]) == ["demo_0", "demo_1"] and file["data"].attrs["num_demos"] == 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_other_settings_in_the_same_folder_are_refused(collected):
    folder, _ = collected
    with pytest.raises(ValueError, match=r"other settings \(seed: 0 there, 7 now\); give another --out-dir"):
        main(config(folder, seed=7))


def test_a_collection_of_before_the_wrist_camera_was_renamed_goes_on(tmp_path):
    settings = config(tmp_path, tasks=("0",), demos_per_task=1)
    (path,) = main(settings)
    with h5py.File(path, "r+") as file:
        args = json.loads(file["data"].attrs["env_args"])
        args["collection"]["wrist"] = args["collection"].pop("eye_in_hand")
        file["data"].attrs["env_args"] = json.dumps(args)
    assert len(load_episodes(main(dataclasses.replace(settings, demos_per_task=2))[0])) == 2
    with pytest.raises(ValueError, match=r"other settings \(eye_in_hand: False there, True now\)"):
        main(dataclasses.replace(settings, eye_in_hand=True))


def test_other_meshes_do_not_mix_in_a_file(tmp_path, monkeypatch):
    def collect(visuals, count):
        monkeypatch.setattr(collect_demos, "visuals_of", lambda suite: visuals)
        (path,) = main(config(tmp_path, tasks=("0",), demos_per_task=count))
        return path, load_episodes(path)

    path, (episode,) = collect("stand-in visuals", 1)
    assert episode.env_args["collection"]["visuals"] == "stand-in visuals"
    with pytest.raises(ValueError, match=r"other settings \(visuals: 'stand-in visuals' there, 'own visuals' now"):
        collect("own visuals", 2)
    with h5py.File(path, "r+") as file:  # of an older version, which does not tell
        args = json.loads(file["data"].attrs["env_args"])
        del args["collection"]["visuals"]
        file["data"].attrs["env_args"] = json.dumps(args)
    (path, found) = collect("own visuals", 2)
    assert len(found) == 2 and found[0].env_args["collection"]["visuals"] is None  # not known of the first

    def gone(suite):
        raise FileNotFoundError("no assets")

    monkeypatch.setattr(collect_demos, "visuals_of", gone)  # nothing is rendered: nothing is asked
    assert main(config(tmp_path, tasks=("0",), demos_per_task=2)) == [path]


def test_attempts_that_rested_after_success_do_not_mix_with_others(tmp_path, policy_file):
    options = {"policy": str(policy_file), "tasks": ("0",), "horizon": 100, "image_size": 64}
    (path,) = main(config(tmp_path, demos_per_task=1, **{**options, "policy": None}))
    with h5py.File(path, "r+") as file:  # of an older version, without attempts
        args = json.loads(file["data"].attrs["env_args"])
        del args["collection"]["policy_plays_on"]
        file["data"].attrs["env_args"] = json.dumps(args)
    main(config(tmp_path, demos_per_task=1, policy_per_task=1, **options))
    main(config(tmp_path, demos_per_task=1, policy_per_task=2, **options))
    with h5py.File(path, "r+") as file:
        args = json.loads(file["data"].attrs["env_args"])
        assert args["collection"].pop("policy_plays_on") is True
        file["data"].attrs["env_args"] = json.dumps(args)
    with pytest.raises(ValueError, match="holds attempts of an older version, in which a policy rested after success"):
        main(config(tmp_path, demos_per_task=1, policy_per_task=3, **options))
    main(config(tmp_path, demos_per_task=2, policy_per_task=2, **options))  # demonstrations may be added


def test_failures_are_retried_or_kept_and_marked(tmp_path):
    hopeless = config(tmp_path / "a", tasks=("0",), demos_per_task=1, action_noise=3.0, max_attempts=2)
    with pytest.raises(RuntimeError, match=r"no success in 2 attempts from seed 0; lower action_noise \(now 3.0\)"):
        main(hopeless)
    (path,) = main(dataclasses.replace(hopeless, out_dir=str(tmp_path / "b"), keep_failed=True))
    with h5py.File(path) as file:
        demo = file["data/demo_0"]
        assert demo.attrs["kind"] == "failed" and not demo.attrs["success"] and demo["dones"][-1] == 0
    assert load_episodes(path, successes_only=False)[0].kind == "failed"


def test_a_task_that_is_named_twice_is_collected_once(tmp_path):
    name = task_names("tabletop_object")[0]
    (path,) = main(config(tmp_path, tasks=(name, "0"), demos_per_task=1))
    with h5py.File(path) as file:
        assert list(file["data"]) == ["demo_0"]
        assert file["data/demo_0/obs/joint_states"].shape == (len(file["data/demo_0/actions"]), 7)
    assert not list(tmp_path.rglob("*.parts"))


def test_attempts_of_a_policy_extend_demonstrations(tmp_path, policy_file):
    settings = config(tmp_path / "a", tasks=("0",), demos_per_task=1, image_size=64)
    (path,) = main(settings)
    first = load_episodes(path)
    extended = dataclasses.replace(settings, policy=str(policy_file), policy_per_task=2, policy_noise=0.1)
    with h5py.File(main(extended)[0]) as file:
        assert set(file["data"]) == {"demo_0", "demo_20000", "demo_20001"}
        attempts = [file[f"data/demo_{i}"] for i in (20000, 20001)]
        assert [a.attrs["kind"] for a in attempts] == ["policy", "policy"]
        assert attempts[0].attrs["policy"] == str(policy_file)
        assert not any(a.attrs["success"] for a in attempts)  # of random weights
        noise = attempts[0]["actions"][:, :3] - attempts[0]["intended_actions"][:, :3]
        assert 0.02 < noise.std() < 0.2
        # every eighth intended action begins a chunk of the policy, which saw that frame
        policy, seed = VLAPolicy.load(policy_file).eval(), int(attempts[0].attrs["seed"])
        images, proprio = attempts[0]["obs/agentview_rgb"], load_episodes(path, successes_only=False)[1].proprio
        for chunk, t in enumerate((0, 8)):
            seen = {"agentview": images[t], "proprio": proprio[t], "instruction": first[0].instruction}
            expected = policy.act(seen, generator=generator("cpu", "recorded policy", seed, chunk))
            np.testing.assert_allclose(attempts[0]["intended_actions"][t : t + 8], expected, atol=1e-4)
    assert [e.name for e in load_episodes(path)] == [e.name for e in first]  # what a policy learns from is the same
    with pytest.raises(ValueError, match=r"policy_noise: 0.1 there, 0.3 now"):
        main(dataclasses.replace(extended, policy_noise=0.3))
    with pytest.raises(ValueError, match="policy_per_task 2 needs a policy: give --policy CHECKPOINT"):
        dataclasses.replace(settings, policy_per_task=2)


def test_attempts_of_a_policy_in_groups(tmp_path, policy_file):
    """Two from each start, with other noise, and the same ones where they are recorded in two goes."""
    options = {"policy": str(policy_file), "policy_group": 2, "horizon": 9, "tasks": ("0",), "demos_per_task": 0}
    settings = config(tmp_path / "own", image_size=64, policy_per_task=3, **options)
    main(settings)
    (path,) = main(dataclasses.replace(settings, policy_per_task=4))
    found = load_episodes(path, successes_only=False)
    assert [e.start == found[0].start for e in found] == [True, True, False, False] and found[2].start == found[3].start
    assert np.array_equal(found[0].images[0], found[1].images[0]) and np.array_equal(
        found[0].proprio[0], found[1].proprio[0]
    )
    assert not np.array_equal(found[0].images[0], found[2].images[0])
    assert len({e.actions.tobytes() for e in found}) == len({e.intended[0].tobytes() for e in found}) == 4
    with pytest.raises(ValueError, match="policy_group: 2 there, 1 now"):
        main(dataclasses.replace(settings, policy_group=1))


def test_attempts_of_a_policy_alone_lie_beside_demonstrations(tmp_path, policy_file):
    settings = config(tmp_path / "demos", tasks=("0",), demos_per_task=1, image_size=64)
    main(settings)
    options = {"policy": str(policy_file), "policy_per_task": 1, "horizon": 21}
    alone = dataclasses.replace(settings, out_dir=str(tmp_path / "own"), demos_per_task=0, **options)
    (path,) = main(alone)
    both = load_episodes([tmp_path / "demos", tmp_path / "own"], successes_only=False)
    assert len(both[1]) == 21 and not both[1].success
    assert [(e.kind, e.name.split("/")[-1]) for e in both] == [("expert", "demo_0"), ("policy", "demo_20000")]
    main(dataclasses.replace(alone, policy_per_task=2))  # of this policy or of another
    with h5py.File(path) as file:
        assert set(file["data"]) == {"demo_20000", "demo_20001"}
    main(dataclasses.replace(alone, demos_per_task=1, horizon=None, out_dir=str(tmp_path / "with_expert")))
    with pytest.raises(ValueError, match=r"demos and \S+/with_expert both have .*/demo_0' .*--demos-per-task 0"):
        load_episodes([tmp_path / "demos", tmp_path / "with_expert"], successes_only=False)


def test_a_task_without_a_plan_does_not_stop_the_others(tmp_path, monkeypatch, capsys):
    def expert(env, seed, **options):
        if env.task_name == task_names("tabletop_object")[0]:
            raise NoPlanError("the expert has no plan for this")
        return Expert(env, seed, **options)

    monkeypatch.setitem(SIMULATORS, "tabletop", SIMULATORS["tabletop"]._replace(expert=expert))
    settings = config(tmp_path, tasks=("0", "1"), demos_per_task=1, workers=1)
    lacking, made = (collect_demos.demo_path(settings, "tabletop_object", task) for task in (0, 1))
    with pytest.raises(RuntimeError, match=f"all others are kept:\n1 of {lacking.name}: the expert has no plan"):
        main(settings)
    assert made.is_file() and not lacking.exists()
    assert str(made) in capsys.readouterr().out


def test_a_policy_of_the_wrist_camera_needs_it_rendered(tmp_path, policy_file):
    policy, path = VLAPolicy.load(policy_file), tmp_path / "wrist.safetensors"
    policy.cfg = dataclasses.replace(policy.cfg, cameras=("wrist_image",))  # its name in RLDS
    policy.save(path)
    options = {"policy": str(path), "tasks": ("0",), "demos_per_task": 0, "policy_per_task": 1, "horizon": 8}
    settings = config(tmp_path / "demos", image_size=64, **options)
    with pytest.raises(ValueError, match="sees camera wrist_image, which is not rendered: give --eye-in-hand"):
        main(settings)
    assert not (tmp_path / "demos").exists()
    (path,) = main(dataclasses.replace(settings, eye_in_hand=True))
    assert len(load_episodes(path, successes_only=False)) == 1


def test_wrist_camera_is_stored_as_eye_in_hand(tmp_path):
    (path,) = main(config(tmp_path, tasks=("0",), demos_per_task=1, eye_in_hand=True))
    with h5py.File(path) as file:
        assert file["data/demo_0/obs/eye_in_hand_rgb"].shape == file["data/demo_0/obs/agentview_rgb"].shape


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["--suites", "tabletop_moon"], "unknown suite 'tabletop_moon'; the suites are: tabletop_spatial"),
        (["--suites", "tabletop_goal", "--tasks", "fly"], "unknown task 'fly' of tabletop_goal; give 0..9 or one of"),
        (["--preset", "huge"], "huge"),
        (["--demos-per-task", "0"], "--demos-per-task 0: nothing to collect"),
        (["--min-speed", "0.9"], "--min-speed 0.9 exceeds --max-speed 0.6"),
        (["--seed", "970001"], "970001: give a number in [0, 970000]"),
        (["--policy", "p"], "--policy p would play nothing: give --policy-per-task"),
        (["--policy-noise", "0.3"], "--policy-noise 0.3 is for attempts of a policy: give --policy-per-task"),
        (["--policy-group", "2"], "--policy-group 2 is for attempts of a policy: give --policy-per-task"),
        (["--colour", "red"], "--colour"),
    ],
)
def test_bad_command_lines_exit_with_a_message(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(collect_demos.Config, PRESETS, arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_presets_select_what_they_say():
    assert list(PRESETS) == ["paper", "small", "tiny", "smoke", "libero"]
    assert PRESETS["paper"].image_size == 256 and len(PRESETS["paper"].suites) == 4 and PRESETS["paper"].tasks is None
    assert PRESETS["tiny"].demos_per_task == 150 and PRESETS["tiny"].tasks == ("0", "1", "2", "3")
