"""LIBERO behind Tabletop's interface. Tests that need LIBERO and its assets are skipped without them."""

import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import libero_missing

import collect_demos
import eval_libero
from vlarft.data import load_episodes
from vlarft.sim import LIBERO_SUITES, check, gl, libero_install, make_env, task_names
from vlarft.sim.libero_env import LiberoEnv
from vlarft.sim.libero_experts import LiberoExpert
from vlarft.sim.libero_install import assets_folder
from vlarft.sim.perturb import Perturbation
from vlarft.sim.suites import make_expert, visuals_of


def _no_renderer() -> str:
    try:
        gl.find_backend()
    except RuntimeError as error:
        return str(error)
    return ""


needs_libero = pytest.mark.skipif(bool(libero_missing()), reason=libero_missing() or "LIBERO is here")
needs_images = pytest.mark.skipif(
    bool(libero_missing() or _no_renderer()), reason=libero_missing() or _no_renderer() or "all here"
)


# Without LIBERO


def test_suites_are_liberos():
    assert list(LIBERO_SUITES) == ["libero_spatial", "libero_object", "libero_goal", "libero_10"]
    assert [LIBERO_SUITES[s].horizon for s in LIBERO_SUITES] == [220, 280, 300, 520]
    assert all(len(set(task_names(suite))) == 10 for suite in LIBERO_SUITES)
    instructions = {task.instruction for suite in LIBERO_SUITES.values() for task in suite.tasks}
    assert "turn on the stove and put the moka pot on it" in instructions
    assert all(re.fullmatch(r"[a-z ]+", text) for text in instructions)


def test_unknown_task_is_refused_before_anything_is_imported():
    with pytest.raises(ValueError, match="unknown task 'fly' of libero_goal; give 0..9 or one of: open_the_middle"):
        make_env("libero_goal", "fly")


def test_missing_libero_and_missing_assets_say_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(libero_install.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"the package libero is missing: pip install .* hf-libero==0\.1\.4"):
        make_env("libero_object", 0)
    monkeypatch.setenv("LIBERO_ASSETS", str(tmp_path))
    (tmp_path / "scenes").mkdir()
    with pytest.raises(FileNotFoundError, match="no folder articulated_objects, stable_hope.*--download-assets FOLDER"):
        assets_folder()


def test_assets_are_labelled(monkeypatch, tmp_path):
    (file,) = libero_install._STAND_IN
    (tmp_path / file).parent.mkdir(parents=True)
    (tmp_path / file).write_bytes(b"bowl")
    assert libero_install.assets_label(tmp_path) == "own visuals"
    monkeypatch.setattr(libero_install, "_STAND_IN", {file: hashlib.sha256(b"bowl").hexdigest()[:20]})
    libero_install.assets_label.cache_clear()
    assert libero_install.assets_label(tmp_path) == "stand-in visuals"


def test_no_renderer_says_what_to_install(monkeypatch):
    monkeypatch.setattr(gl.ctypes.util, "find_library", lambda name: None)
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    with pytest.raises(RuntimeError, match="no OpenGL library .* libegl1 .*; or apt-get install libosmesa6"):
        gl.find_backend()
    monkeypatch.setenv("MUJOCO_GL", "glfw")
    with pytest.raises(RuntimeError, match="MUJOCO_GL=glfw cannot render without a screen"):
        gl.find_backend()
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    monkeypatch.setattr(gl.ctypes.util, "find_library", lambda name: name)
    assert gl.find_backend() == "osmesa"


@pytest.mark.parametrize("backend", ["egl", "osmesa"])
def test_each_library_renders_with_the_first_row_at_the_bottom(backend, tmp_path):
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("MUJOCO_GL", backend)
            gl.find_backend()
    except RuntimeError as error:
        pytest.skip(str(error))
    code = """
import sys, mujoco, numpy as np
from vlarft.sim.gl import FAST, GLRenderer
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 -3 1" dir="0 1 0"/><camera name="front" pos="0 -2 0" xyaxes="1 0 0 0 0 1"/>'
    '<geom type="box" size=".3 .3 .3" pos="0 0 .5" rgba="1 0 0 1" group="1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
np.save(sys.argv[1], GLRenderer(model, (32, 48), FAST).render(data, "front"))
"""
    path = tmp_path / "image.npy"
    variables = {**os.environ, "MUJOCO_GL": backend}
    run = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=variables)
    assert run.returncode == 0, run.stderr
    image = np.load(path)
    assert image.shape == (32, 48, 3) and image.dtype == np.uint8
    rows, columns = np.nonzero((image[..., 0] > 100) & (image[..., 1:] < 50).all(-1))
    assert len(rows) > 30 and rows.mean() > 18 and abs(columns.mean() - 23.5) < 1  # a red box, above the middle


def test_simple_meshes_keep_shape_and_front_and_leave_the_model_alone():
    mujoco = pytest.importorskip("mujoco")
    # a square plate of four triangles in front (two of them slivers at a corner of 1 mm) and two behind
    vertices = "0 0 0  .1 0 0  .1 .1 0  0 .1 0  .001 0 0  0 0 .02"
    faces = "0 4 3  4 1 2  4 2 3  0 2 1  0 3 2  0 1 5"
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><asset><mesh name="m" inertia="shell" vertex="{vertices}" face="{faces}"/></asset>'
        '<worldbody><geom type="mesh" mesh="m"/></worldbody></mujoco>'
    )
    before = model.mesh_face.copy(), model.mesh_facenum.copy()

    def triangles(drawn):
        corners = drawn.mesh_vert[drawn.mesh_face[: drawn.mesh_facenum[0]]]  # (F, 3, 3)
        return np.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]) / 2  # area times direction

    assert len(triangles(model)) == 6
    same = gl.with_simple_meshes(model, 1e-9)
    np.testing.assert_array_equal(same.mesh_face, model.mesh_face)
    simple = gl.with_simple_meshes(model, 0.005)  # 0 and 4 become one vertex
    assert len(triangles(simple)) == 5  # one was flat, the first
    np.testing.assert_array_equal(simple.mesh_facenormal[:5], model.mesh_facenormal[1:6])
    np.testing.assert_array_equal(simple.mesh_facetexcoord[:5], model.mesh_facetexcoord[1:6])
    for ours, theirs in zip((model.mesh_face, model.mesh_facenum), before, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(triangles(simple).sum(0), triangles(model).sum(0), atol=2e-5)
    twice = vertices.replace(".001 0 0", ".0 0 .001"), faces.replace("4 1 2  4 2 3", "0 1 2  1 2 4")
    model = mujoco.MjModel.from_xml_string(
        f'<mujoco><asset><mesh name="m" inertia="shell" vertex="{twice[0]}" face="{twice[1]}"/></asset>'
        '<worldbody><geom type="mesh" mesh="m"/></worldbody></mujoco>'
    )
    corners = gl.with_simple_meshes(model, 0.005)
    rows = corners.mesh_face[: corners.mesh_facenum[0]]
    assert len(rows) == len({tuple(np.roll(row, -row.argmin())) for row in rows}) == 4  # 012 once, its back side stays


def test_check_exits_with_an_error_and_the_fix_where_libero_is_missing(tmp_path):
    code = "import sys; sys.modules['libero'] = None; from vlarft.sim.check import main; sys.exit(main([]))"
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "LIBERO_ASSETS": str(tmp_path)},
    )
    assert run.returncode == 1, run.stderr
    assert "MISSING  assets: LIBERO's assets are not at LIBERO_ASSETS" in run.stdout
    assert "MISSING  packages" in run.stdout and "pip install" in run.stdout
    assert "not tested" in run.stdout


def test_check_says_what_to_install_where_an_episode_does_not_repeat(monkeypatch):
    ends = iter("ab")
    env = SimpleNamespace(reset=lambda **_: None, step=lambda _: None, get_state=lambda: next(ends))
    monkeypatch.setattr(check, "make_env", lambda *_: env)
    with pytest.raises(RuntimeError, match=re.escape(check.INSTALL)):
        check.check_episode("libero_object")


def test_check_names_a_mujoco_that_is_too_new(monkeypatch):
    monkeypatch.setattr(check, "package_folder", lambda: None)
    monkeypatch.setattr(check, "import_libero", lambda: None)
    for version, fits in (("3.8.2", True), ("3.10.0", False), ("4.0.1", False)):
        monkeypatch.setattr(check, "_version", lambda name, version=version: version)
        if fits:
            assert "mujoco 3.8.2" in check.check_packages()
        else:
            with pytest.raises(RuntimeError, match=f"fails with mujoco {version}: pip install 'mujoco<3.9'"):
                check.check_packages()


def test_fast_rendering_is_liberos_alone(policy_file, tmp_path):
    config = dataclasses.replace(eval_libero.PRESETS["smoke"], policies=(str(policy_file),), out_dir=str(tmp_path))
    with pytest.raises(ValueError, match="fast_rendering is a setting of LIBERO's renderer; tabletop_object has none"):
        eval_libero.main(dataclasses.replace(config, fast_rendering=True))
    with pytest.raises(ValueError, match="fast_rendering is a setting of LIBERO's renderer; tabletop_object has none"):
        dataclasses.replace(collect_demos.PRESETS["smoke"], fast_rendering=True)


# With LIBERO


@needs_libero
def test_task_table_is_liberos():
    libero_install.import_libero()
    from libero.libero.benchmark import get_benchmark

    for suite, ours in LIBERO_SUITES.items():
        theirs = get_benchmark(suite)()
        assert [t.name for t in theirs.tasks] == [t.name for t in ours.tasks]
        assert [t.language for t in theirs.tasks] == [t.instruction for t in ours.tasks]


@needs_libero
def test_importing_and_playing_writes_nothing_outside(tmp_path):
    home, temporary = tmp_path / "home", tmp_path / "tmp"
    home.mkdir(), temporary.mkdir()
    code = (
        "from vlarft.sim import make_env\n"
        "env = make_env('libero_object', 0); env.reset(init_state=0); env.step([0] * 7); print(env.visuals)"
    )
    variables = {**os.environ, "HOME": str(home), "TMPDIR": str(temporary)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=variables, input="")
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() in ("stand-in visuals", "own visuals")
    assert not list(home.rglob("*")) and not list(temporary.rglob("*"))


_EPISODE = """
import hashlib, numpy as np
from vlarft.sim import make_env
env = make_env("libero_spatial", 7)
env.reset(init_state=3)
actions = np.random.default_rng(0).uniform(-1, 1, (100, 7))
digest = hashlib.sha256()
for action in actions:
    env.step(action)
    digest.update(env.get_state().tobytes())
print(digest.hexdigest())
"""


@needs_libero
@pytest.mark.slow
def test_a_hundred_steps_repeat_bit_for_bit_across_processes():
    runs = [subprocess.run([sys.executable, "-c", _EPISODE], capture_output=True, text=True) for _ in range(2)]
    assert runs[0].stdout == runs[1].stdout and len(runs[0].stdout) == 65, runs[0].stderr


@pytest.fixture(scope="module")
def env():
    return make_env("libero_object", 0, 64)


@needs_libero
def test_reset_and_set_state_leave_nothing_behind(env):
    actions = np.random.default_rng(1).uniform(-1.0, 1.0, (30, 7))
    ends = []
    for _ in range(2):  # the second time after another episode, gripper closed and hand turned
        env.reset(init_state=5)
        for action in actions[:15]:
            env.step(action)
        middle = env.get_state()
        for action in actions[15:]:
            env.step(action)
        ends.append(env.get_state())
    np.testing.assert_array_equal(*ends)
    env.reset(seed=0)
    env.set_state(middle)
    np.testing.assert_array_equal(env.get_state(), middle)
    for action in actions[15:]:
        env.step(action)
    np.testing.assert_array_equal(env.get_state(), ends[0])
    assert env.num_steps == 30


@needs_libero
def test_starts_and_bad_input(env):
    env.reset(init_state=0)
    first = env.physics.position("milk_1"), env.physics.hand_position
    assert env.num_steps == 0 and not env.success() and env.physics.goals == [["in", *env.physics.goals[0][1:]]]
    env.reset(seed=0)
    assert np.abs(env.physics.position("milk_1") - first[0]).max() > 1e-3
    assert 1e-3 < np.abs(env.physics.hand_position - first[1]).max() < 0.05
    assert env.physics.proprio().shape == (8,) and env.physics.proprio()[7] < 0 < env.physics.proprio()[6]
    with pytest.raises(ValueError, match="give either init_state or seed"):
        env.reset()
    with pytest.raises(ValueError, match=r"init_state must be 0\.\.49, got 50"):
        env.reset(init_state=50)
    with pytest.raises(ValueError, match="seed must be >= 0"):
        env.reset(seed=-1)
    with pytest.raises(ValueError, match=r"action must have shape \(7,\)"):
        env.step(np.zeros(6))
    with pytest.raises(ValueError, match="NaN"):
        env.step(np.full(7, np.nan))
    with pytest.raises(ValueError, match="state of libero_object/pick_up_the_alphabet_soup.* has shape"):
        env.set_state(np.zeros(3))


@needs_libero
@pytest.mark.parametrize("perturb", [None, "all:2/2/20"])
def test_a_step_has_the_bits_of_liberos_own(perturb, monkeypatch):
    env = make_env("libero_goal", 0, 64, cameras=())  # it has a drawer, a stove and a rack
    assert env.physics.model.opt.integrator == 0  # Euler's: mj_step2 has no other
    actions = np.random.default_rng(0).uniform(-1, 1, (40, 7)).astype(np.float32)
    actions[:, 2] -= 0.7  # downwards

    def states():
        env.reset(init_state=1, perturb=perturb and Perturbation.parse(perturb))
        contacts, found = [env.physics.data.ncon], []
        for number, action in enumerate(actions):
            env.step(action)
            found.append(env.get_state())
            contacts.append(env.physics.data.ncon)
            if number == 20:
                env.reset(init_state=2)
                env.set_state(found[-1])
        assert len(set(contacts)) > 1
        return found

    ours = states()
    monkeypatch.setattr(type(env.physics), "_libero_step", lambda physics, action: physics.libero.step(action))
    np.testing.assert_array_equal(ours, states())


_LIBEROS_OWN = """
import logging, sys
import numpy as np
logging.FileHandler = lambda path: logging.NullHandler()  # robosuite's would write to /tmp
import robosuite  # before import_libero, which leaves its renderer out
from robosuite.utils.transform_utils import quat2axisangle
from vlarft.sim.libero_env import initial_states
from vlarft.sim.libero_install import import_libero, package_folder
suite, task, name, out = sys.argv[1], int(sys.argv[2]), *sys.argv[3:]
place = str(package_folder() / "bddl_files" / suite / (name + ".bddl"))
env = import_libero().OffScreenRenderEnv(bddl_file_name=place, camera_heights=64, camera_widths=64)
env.seed(0)
env.reset()
env.set_init_state(initial_states(suite, task)[3])
for _ in range(10):
    env.step([0.0] * 6 + [-1.0])
qpos = env.sim.data.qpos.copy()
env.sim.forward()  # it shows poses of 2 ms before
env._update_observables(force=True)
obs = env.env._get_observations()
proprio = [obs["robot0_eef_pos"], quat2axisangle(obs["robot0_eef_quat"]), obs["robot0_gripper_qpos"]]
images = {name: obs[name + "_image"] for name in ("agentview", "robot0_eye_in_hand")}
np.savez(out, qpos=qpos, proprio=np.concatenate(proprio), **images)
"""


@needs_images
@pytest.mark.slow
@pytest.mark.parametrize(("suite", "task"), [("libero_object", 0), ("libero_goal", 7)])
def test_a_start_is_that_of_liberos_own_environment(suite, task, tmp_path):
    if gl.find_backend() != "egl":
        pytest.skip("robosuite renders by EGL, an OpenGL library that is not here")
    words = suite, str(task), task_names(suite)[task], str(tmp_path / "own.npz")
    variables = {**os.environ, "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}
    variables.pop("CUDA_VISIBLE_DEVICES", None)  # robosuite reads it, and fails where it is empty
    run = subprocess.run([sys.executable, "-c", _LIBEROS_OWN, *words], capture_output=True, text=True, env=variables)
    assert (tmp_path / "own.npz").is_file(), run.stderr
    own = np.load(tmp_path / "own.npz")
    env = make_env(suite, task, 64, cameras=("agentview", "eye_in_hand"))
    env.reset(init_state=3)
    seen = env.observe()
    np.testing.assert_array_equal(env.physics.data.qpos, own["qpos"])
    np.testing.assert_allclose(seen["proprio"], own["proprio"], atol=1e-6)
    for ours, theirs in (("agentview", "agentview"), ("eye_in_hand", "robot0_eye_in_hand")):
        np.testing.assert_array_equal(seen[ours], own[theirs][::-1, ::-1])


@needs_images
def test_episodes_side_by_side_see_what_each_sees_alone(env):
    """Images and proprio, before the first step after `set_state` too."""

    def action(state, step):
        return np.random.default_rng([state, step]).uniform(-1.0, 1.0, 7)

    alone = {}
    for state in (0, 1):
        env.reset(init_state=state)
        for step in range(16):
            if step % 4 == 0:
                alone[state, step] = env.observe()
            env.step(action(state, step))
    saved = {}
    for state in (0, 1):
        env.reset(init_state=state)
        saved[state] = env.get_state()
    for step in range(16):
        for state in (0, 1):
            env.set_state(saved[state])
            if step % 4 == 0:
                seen = env.observe()
                np.testing.assert_array_equal(seen["proprio"], alone[state, step]["proprio"])
                np.testing.assert_array_equal(seen["agentview"], alone[state, step]["agentview"])
            env.step(action(state, step))
            saved[state] = env.get_state()
    assert (alone[0, 12]["agentview"] != alone[1, 12]["agentview"]).any()


@needs_images
def test_a_stove_glows_in_its_own_episode_alone():
    env = make_env("libero_goal", "turn_on_the_stove", 64)
    env.reset(init_state=0)
    off, dark = env.get_state(), env.observe()["agentview"]
    (knob,) = env.physics.libero.get_object("flat_stove_1").joints
    env.physics.data.joint(knob).qpos[:] = 1.0
    assert env.step(np.zeros(7)).success
    on, glowing = env.get_state(), env.observe()["agentview"]
    assert (dark != glowing).any()
    for state, image in ((off, dark), (on, glowing)):
        env.set_state(state)
        np.testing.assert_array_equal(env.observe()["agentview"], image)


@needs_images
def test_images_are_turned_and_settings_change_them(env):
    env.reset(init_state=0)
    image = env.observe()["agentview"]
    assert image.shape == (64, 64, 3) and image.dtype == np.uint8
    raw = env._renderer.render(env.physics.data, "agentview")
    np.testing.assert_array_equal(image, raw[::-1, ::-1])
    other = make_env("libero_object", 0, 64, cameras=("image",))  # the name in LeRobot's copies of LIBERO
    other.reset(init_state=0)
    np.testing.assert_array_equal(other.observe()["image"], image)
    whole = dataclasses.replace(gl.FAST, mesh_cell=0.0)
    frames = []
    for rendering, cameras in ((whole, ("agentview", "eye_in_hand")), (gl.FAST, ("agentview",))):
        fast = LiberoEnv("libero_object", 0, (64, 64), cameras, rendering=rendering)
        fast.reset(init_state=0)
        frames.append(fast.observe())
        assert ("simplified to 4 mm" in fast.visuals) == (rendering == gl.FAST)
        assert fast.visuals == visuals_of("libero_object", fast_rendering=rendering == gl.FAST)
    assert frames[0]["eye_in_hand"].shape == (64, 64, 3)
    edges, meshes = (np.abs(frames[i]["agentview"].astype(int) - frames[0]["agentview"]).mean() for i in (0, 1))
    assert 0 < np.abs(frames[0]["agentview"].astype(int) - image).mean() < 3.0 and edges == 0 < meshes < 2.0
    with pytest.raises(ValueError, match="eye_in_hand of libero_object, which is too near for the simplified meshes"):
        make_env("libero_object", 0, 64, fast_rendering=True, cameras=("agentview", "eye_in_hand"))


@needs_libero
@pytest.mark.parametrize(
    ("text", "movers"),
    [
        ("object:2.5", {"alphabet_soup_1": 0.025}),
        ("goal:5:x", {"basket_1": 0.05}),
        ("all:2/4/20", {"alphabet_soup_1": 0.02, "basket_1": 0.04}),
    ],
)
def test_only_the_named_things_move_and_within_range(env, text, movers):
    largest = dict.fromkeys(env.physics.objects, 0.0)
    hand = 0.0
    for state in range(3):
        env.reset(init_state=state)
        plain, at = {name: env.physics.position(name) for name in env.physics.objects}, env.physics.hand_position
        env.reset(init_state=state, perturb=Perturbation.parse(text))
        hand = max(hand, np.abs(env.physics.hand_position - at).max())
        for name in largest:
            moved = np.abs(env.physics.position(name) - plain[name])[:2]
            largest[name] = max(largest[name], moved.max())
            if ":x" in text:
                assert moved[1] < 1e-3
    for name, distance in largest.items():
        assert distance <= movers.get(name, 0.0) + 2e-3, name
        assert name not in movers or distance > 0.2 * movers[name], name
    assert hand > 0.005 if "/20" in text else hand < 2e-3


@needs_libero
def test_perturbations_reject_overlaps_repeat_and_complain(env):
    close = Perturbation(object_cm=20.0)  # things stand 10 to 20 cm apart
    rejected = 0
    for state in range(4):
        env.reset(init_state=state, perturb=close)
        rejected += env.num_rejected
    assert rejected > 0
    states = []
    for _ in range(2):
        env.reset(init_state=3, perturb=Perturbation.parse("all:5/5/50"))
        states.append(env.get_state())
    np.testing.assert_array_equal(*states)
    with pytest.raises(RuntimeError, match="no valid start in 2 tries"):
        env.reset(init_state=0, perturb=Perturbation(robot_mm=3000.0, max_tries=2))
    push = make_env("libero_goal", "push_the_plate_to_the_front_of_the_stove", 64)
    with pytest.raises(ValueError, match="its goal is a region of the table"):
        push.reset(init_state=0, perturb=Perturbation(goal_cm=5.0))


@needs_libero
def test_the_expert_refuses_what_it_has_no_plan_for():
    with pytest.raises(ValueError, match="no plan for close microwave_1; it places things on and in others, opens"):
        LiberoExpert(make_env("libero_10", 9, 64))


@needs_images
@pytest.mark.slow
def test_demonstrations_have_liberos_layout_and_play_again_through_the_evaluation(tmp_path):
    h5py = pytest.importorskip("h5py")
    libero = dataclasses.replace(
        collect_demos.PRESETS["libero"], suites=("libero_object",), tasks=("1",), demos_per_task=1, image_size=32
    )
    config = dataclasses.replace(libero, fast_rendering=True, workers=1, out_dir=str(tmp_path / "demos"))
    (path,) = collect_demos.main(config)
    with h5py.File(path) as file:
        assert "image_convention" not in file["data"].attrs
        assert (
            file["data"].attrs["bddl_file_name"] == f"libero_object/{LIBERO_SUITES['libero_object'].tasks[1].name}.bddl"
        )
    (episode,) = load_episodes(path, with_states=True)
    assert episode.env_args["collection"]["visuals"] == visuals_of("libero_object") is not None
    env = make_env("libero_object", 1, 32, fast_rendering=True)
    env.reset(seed=0)
    for t in range(len(episode)):
        np.testing.assert_array_equal(env.physics.libero_state(), episode.states[t])
        if t % 40 == 0:
            np.testing.assert_array_equal(env.observe()["agentview"], episode.images[t])
            np.testing.assert_array_equal(env.physics.proprio(), episode.proprio[t])
        env.step(episode.actions[t])
    assert env.success()


@needs_libero
def test_sampled_things_stand_on_their_fixtures_at_every_reset():
    env = make_env("libero_spatial", "pick_up_the_black_bowl_on_the_stove_and_place_it_on_the_plate", 32)
    places = []
    for seed in (0, 1, 0):
        env.reset(seed=seed)
        places.append([env.physics.position(name).copy() for name in ("akita_black_bowl_1", "akita_black_bowl_2")])
        for bowl, below in (("akita_black_bowl_1", "flat_stove_1"), ("akita_black_bowl_2", "wooden_cabinet_1")):
            assert np.abs(env.physics.position(bowl) - env.physics.position(below))[:2].max() < 0.2
            env.physics.settle()
            assert env.physics.position(bowl)[2] > env.physics.position(below)[2] + 0.015  # and does not fall
    np.testing.assert_array_equal(places[0], places[2])
    assert np.abs(np.subtract(places[0], places[1])).max() > 1e-3


@needs_libero
@pytest.mark.slow
def test_the_expert_wins_again_open_loop_and_chance_does_not(tmp_path):
    env = make_env("libero_object", 0, cameras=())
    env.reset(init_state=0)
    expert, actions, done = make_expert(env, 0, speed=1.0), [], False
    while not done:
        actions.append(expert.act().executed.astype(np.float32).tolist())
        done = env.step(np.float32(actions[-1])).done
    recorded = tmp_path / "episodes.jsonl"
    start = {"policy": "expert", "suite": "libero_object", "task": 0, "init_state": 0, "success": True}
    recorded.write_text(json.dumps({**start, "rejected_starts": 0, "steps": len(actions), "actions": actions}) + "\n")
    config = dataclasses.replace(
        eval_libero.PRESETS["paper"],
        policies=(str(recorded), "random"),
        suites=("libero_object",),
        tasks=("0",),
        episodes=1,
        workers=0,
        out_dir=str(tmp_path / "eval"),
    )
    expert, chance = eval_libero.main(config)["policies"]
    assert expert["all"]["success"] == 1 and chance["all"]["success"] == 0
    lines = [json.loads(line) for line in (Path(config.out_dir) / "episodes.jsonl").read_text().splitlines()]
    assert np.array_equal(np.float32(lines[0]["actions"]), np.float32(actions))
