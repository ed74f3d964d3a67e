"""Make a workspace (`ferry init`)."""

from __future__ import annotations

import os
import re
import shutil
import tomllib
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flows import clone
from flows.errors import WorkspaceError
from flows.settings import SETTINGS, Settings
from flows.workspace import Workspace
from model.errors import RevisionError
from model.folder import inside, shown
from model.scorecard import LineName
from ota.wording import first_fault


def create(root: Path, lines: list[str], settings: str | None = None) -> Workspace:
    """Make a workspace, or complete one that a killed call left incomplete; what is there is kept.

    Args:
        root: the folder; made when missing.
        lines: names of the lines in a new `ferry.toml`.
        settings: content of a new `ferry.toml`; None: defaults for the lines, with comments.

    Raises:
        WorkspaceError: a name is not valid, or the folder holds something else; nothing was made.
        DataError: a line's data folder would lie behind a link; in a new workspace, nothing was made.
    """
    from model import versions
    from ota.release import keys, repository

    path = root / SETTINGS
    if not path.is_file():
        _check_name(root)
        for name in lines:
            try:
                TypeAdapter(LineName).validate_python(name)
            except ValidationError as error:
                raise WorkspaceError(
                    f"'{shown(name)}' cannot be the name of a line; use lower-case letters, digits and '-', 40 at most"
                ) from error
        ours = ("data", ".git", f".{SETTINGS}.tmp")
        if root.is_symlink() and not root.exists():
            raise WorkspaceError(f"{shown(root)} is a link whose target does not exist; name a folder")
        if root.exists() and not root.is_dir():
            raise WorkspaceError(f"{shown(root)} is a file; name a folder")
        if root.is_dir() and any(entry.name not in ours for entry in root.iterdir()):
            raise WorkspaceError(f"{shown(root)} holds other things; name an empty folder, or one with nothing but data/")
        text = settings or template([*dict.fromkeys(lines)])
        try:
            made = Settings.model_validate(tomllib.loads(text))
        except ValidationError as error:
            raise WorkspaceError(f"the settings for {SETTINGS} are not valid: {shown(first_fault(error, Settings))}") from error
        except tomllib.TOMLDecodeError as error:
            raise WorkspaceError(f"the settings for {SETTINGS} are not valid TOML: {shown(error)}") from error
        for line in made.lines.values():
            inside(root, line.data)
        root.mkdir(parents=True, exist_ok=True)
        fresh = root / f".{SETTINGS}.tmp"
        fresh.unlink(missing_ok=True)
        with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            file.write(text)  # an address in it may hold a password
        fresh.replace(path)
    workspace = Workspace(root)
    root = workspace.root
    if (root / "keys" / clone.OWN).exists():
        raise WorkspaceError(
            f"{root} is a clone with records of its own; to make it a factory of its own, remove keys/{clone.OWN}, and the databases and "
            "mlartifacts/, first"
        )
    for line in workspace.settings.lines.values():
        inside(root, line.data).mkdir(parents=True, exist_ok=True)
    ignored = root / ".gitignore"
    known = ignored.read_bytes().splitlines() if ignored.is_file() else []
    asked = [*(f"/{name}".encode() for name in IGNORED), b"*.pem", b"*.secret"]  # private keys, wherever they are
    ignored.write_bytes(b"\n".join([*known, *(name for name in asked if name not in known)]) + b"\n")
    versions.init(root, workspace.data_remote, workspace.settings.stores.s3_endpoint)
    ring = keys.create(root / "keys")
    repository.Repository.create(root / "repository", ring)
    anchor = root / "root.json"
    shutil.copyfile(root / "repository" / "metadata" / "1.root.json", anchor)
    workspace.inbox.mkdir(parents=True, exist_ok=True)
    workspace.ledger.head()
    workspace.fleet.devices()
    return workspace


def _check_name(root: Path) -> None:
    """Refuse a folder whose path does not fit into all parts of a workspace: settings, URLs of databases, DVC's configuration.

    Raises:
        WorkspaceError: the path does not fit.
    """
    from model import versions

    name = str(root.absolute())
    try:
        name.encode()
        versions.check_remote(name)
    except (UnicodeEncodeError, RevisionError):
        unfit = True
    else:
        unfit = not name.isprintable() or bool({*"?#"} & {*name})  # ? and # end the path in a URL
    if unfit:
        raise WorkspaceError(f"a workspace cannot be kept in {shown(name)}; choose a path of letters, digits, '-' and '_'")


IGNORED = (
    "keys", "repository", "published", "dvc-remote", "ferry.db", "ferry.db-shm", "ferry.db-wal", "mlflow.db", "mlartifacts", "inbox",
    "reports-archive", "work", "report.html", "explain.html",
    "devices", "pictures", "ratings",
)  # fmt: skip


def template(lines: list[str]) -> str:
    """Return the text of a ferry.toml for these lines: every key with its meaning.

    Optional keys are comments, one key a line. Each of these lines can be uncommented alone: it then holds the key's default, or an
    example if the key has none.
    """
    text = _HEAD.replace("LINE", lines[0]) + "".join(_LINE.replace("LINE", name) for name in lines)
    return re.sub(r"^(.*?\S) +# ", lambda found: f"{found[1]:<34} # ", text, flags=re.MULTILINE)  # names differ in length


# Sizes and times of the tiers: `model.export.pack` and `Session.generate` on untrained networks, processor time of one thread of an
# AMD EPYC (Zen 4), sampler ab2 with 14 guided steps; base on a GPU: tests/bench/results/gpu.md. Training: tests/bench/results/model.md.
_HEAD = """\
# Settings of a DeltaFerry workspace. Relative paths start at this folder.
# A line such as "# key = value" is optional: remove "# " and enter your value. What it shows is the default, or an example.
# `ferry data add` records this file in Git, unless an address in it holds a password. Keep passwords out of it: the environment variables
# FERRY_STORES_DATABASE and FERRY_STORES_MLFLOW (in general FERRY_STORES_ and a key of [stores] in capitals) replace these addresses, S3
# takes its account from AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, MLflow from MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD,
# Prefect from PREFECT_API_AUTH_STRING.
schema = 2                         # version of the workspace's format
require_approval = false           # true: a version that passes the gate waits for `ferry approve`
poll_seconds = 60                  # seconds between two checks of MLflow's aliases by `ferry serve`
# parallel = 1                     # configurations that are retrained at the same time; each needs processor cores of its own

[stores]
data = "dvc-remote"                # bytes of all data revisions (DVC): a folder, or s3://bucket/prefix
database = "sqlite:///ferry.db"    # decisions and devices; postgresql://... if several machines share them
mlflow = "sqlite:///mlflow.db"     # versions and their figures; or the http(s) address of an MLflow server
publish = "published"              # where devices fetch updates: a folder, or s3://bucket/prefix
s3_endpoint = ""                   # URL of an S3-compatible server; empty: the servers of AWS
reports = "inbox"                  # folder in which devices leave their reports

[alerts]                           # tells failed retrainings, refused promotions and expiring signatures, once for each change
# command = ["/usr/local/bin/page", "factory"]  # is run with JSON on standard input
# webhook = "https://alerts.example/ferry"  # is sent JSON, signed with the secret in the environment variable FERRY_ALERT_SECRET

[gateway]                          # where devices report and fetch updates: `ferry gateway`, or `ferry serve --gateway`
# host = "127.0.0.1"               # address to listen at; without TLS it must be the loopback
# port = 8443
# tls_cert = "/etc/ferry/cert.pem"  # certificate chain; without it, a proxy on this machine adds TLS
# tls_key = "/etc/ferry/key.pem"   # its private key
# insecure_bind = false            # true: listen beyond the loopback without TLS, because a proxy elsewhere adds it
# trusted_proxies = []             # proxies whose X-Forwarded-For is believed, such as "10.0.0.7"
# access_log = false               # true: a line for each request, without queries

[prices]                           # for the yearly cost in `ferry report`; what stays a comment counts as assumed, and is marked so
# currency = "EUR"
# megabyte = 0.5                   # price of 1 MB of traffic to or from a device
# training_hour = 0.1              # price of an hour of the machine that trains
# fleet = 1000                     # number of devices
# device = 40.0                    # extra price of a device whose hardware can draw images; 0 if it is there anyway
# device_years = 5.0               # years that a device is used
# images_per_day = 100.0           # images that a device draws in a day
# kilowatt_hour = 0.3              # price of electricity at a device
# operator_hour = 60.0             # price of an hour of the person who retrains and rolls out
# operator_hours = 2.0             # hours that this person needs for an update
# updates_per_year = 12.0
# cloud_gpu_hour = 1.0             # to compare with: price of an hour of a rented accelerator,
# cloud_gpu_seconds = 0.1          # and seconds that an image occupies it, idle time included;
# cloud_thousand_images = 3.0      # or the price of 1,000 images from a service (example: by default, accelerators are rented)
# cloud_image_kilobytes = 5.0      # traffic of an image from the cloud, in kB
# cloud_gpu_teraflops = 17.0       # 10^12 operations that it does in a second, where [gpu] has no time (NVIDIA H200, nano)

[energy]                           # energy of an image by line, class and variant, for the report; `ferry-agent bench` measures it
# LINE.edge.full = { joules = 2.1, low = 1.9, high = 2.3, source = "RAPL package-0", quality = "measured" }

[gpu]                              # seconds of an accelerator for 1,000 images, measured; what is not here is estimated
# LINE.I.full = { seconds = 0.7, source = "NVIDIA L4, batches of 256" }

# A line is one product. Choose tier, image_size and configuration by what an image may cost on a device. One core of an AMD EPYC
# (Zen 4) took this long for an image of 16 pixels, in 28 network evaluations (variant dev) and with weights in bfloat16; full takes
# twice as long, fast half as long, turbo a seventh. With 32 pixels, nano took 3.3 times as long in configuration I, and 6.2 times in II.
#
#   tier    weights      file    configuration I      II    training, images a second
#   test     0.09 M    0.2 MB             0.01 s  0.03 s    (for trials only)
#   nano      2.8 M    5.7 MB             0.10 s  0.35 s    80 on one core (16 pixels)
#   small    15.2 M   30.4 MB             0.41 s  1.27 s    64 on 16 cores, 5,269 on a GPU (32 pixels, NVIDIA H200)
#   base     90.0 M  180.1 MB             1.78 s  5.97 s    2 on 16 cores, 609 on a GPU (64 pixels)
#
# Of small and base, time and size were measured; quality was not.
#
# The data folder of a line holds images and metadata.jsonl, which has one line for each image:
#
#   {"file_name": "0001.png", "text": "gasket, torn", "group": "photograph 17"}
#
# Images of one group (cut from one photograph, or of one part) are held out together. Leave group out if an image stands alone.
"""
_LINE = """
[lines.LINE]
data = "data/LINE"                 # the data folder
tier = "nano"                      # size of the network: test, nano, small or base
image_size = 16                    # width and height in pixels, 8 to 128; images are scaled to it
channels = 1                       # 1 is grey, 3 is colour
text_length = 24                   # bytes of a caption that the network reads; make it as long as your longest caption
update_method = "lowrank"          # how a retraining's change is made small; without this key it is rounded, as update_grid says
# update_budget = "64KiB"          # most that a device may fetch for an update; the smallest that passes and keeps update_keep is taken
# update_keep = 0.98               # with a budget: share of the gain without a limit that an update must be shown to keep
# update_level = 0.03              # without a budget: noise of an update; more takes fewer bytes and loses more
# update_polish = 40               # training steps that follow on the rounded update, which then keeps more
# router = "expert-choice"         # experts choose positions; "token-choice": positions choose experts
# require_approval = true          # for this line: a version that passes the gate waits for `ferry approve`
# classes.station = { configuration = "II", variants = ["full"], latency_ms = 2000 }  # a second kind of device; keys as below

[lines.LINE.training]              # the first version, from noise
steps = 400                        # at 80 images a second (nano on one core), 400 x 32 images take less than three minutes
batch = 32                         # images in each step
learning_rate = 2e-3               # highest rate; it rises at the start and falls to 0 at the end
# update_grid = 0.0                # has no effect on a training from noise
# seed = 0                         # on a CPU, the same seed gives the same weights

[lines.LINE.retraining]            # later versions, from the champion
steps = 200
batch = 32
learning_rate = 5e-4
# update_grid = 0.0                # without update_method, 2.0 rounds each change, so that its delta is small, and loses 4 % of the gain
# seed = 0

[lines.LINE.distillation]          # a student of full, which draws in a few evaluations: turbo
steps = 160
batch = 16
learning_rate = 3e-3
update_grid = 1.0                  # rounds its difference from full, so that a bundle hardly grows
# trajectories = 384               # images that full draws for the student
# thin = true                      # trains a twentieth of the weights; the rest is that of full
# seed = 0

[lines.LINE.sampler]               # how the variant full draws
method = "ab2"                     # euler, heun (two evaluations a step) or ab2 (second order, one evaluation a step)
steps = 28                         # with guidance, a step evaluates the network twice: 56 evaluations; time grows with them
guidance = 2.0                     # how strongly a caption is followed; 1 is unguided and takes half of the time
# shift = 1.0                      # grid of the times: 1 is even, below 1 the steps at little noise are shorter
# guidance_low = 0.0               # guide only at times from here (0 is the image)
# guidance_high = 1.0              # to here (1 is noise)

[lines.LINE.samplers]              # other variants; by default dev takes half, fast a quarter of these steps, turbo 4 of a student
# dev = { method = "ab2", steps = 14, guidance = 2.0, shift = 0.7 }
# fast = { method = "ab2", steps = 7, guidance = 2.0, shift = 0.5, guidance_low = 0.0, guidance_high = 1.0 }
# turbo = { method = "mean", steps = 4, guidance = 1.0 }

[lines.LINE.gate]                  # what a version must show to become champion
images = 256                       # images that are generated for each evaluation
minimum_images = 96                # with fewer held-out images nothing is decided; 15 % are held out, so it takes about 640 images
alpha = 0.05                       # chance of promoting a worse model
tolerance = 0.5                    # how much worse it may be on old data: a share of the champion's own distance from real images,
tolerance_bands = 1.5              # or a multiple of the distance between two sets of real images; the larger limit counts
total_tolerance = 2.0              # how much worse it may be than the best version ever, in multiples of that limit
coverage = 0.3                     # smallest share of held-out images that have a generated image near them
implausible = 0.3                  # limit of the share of images unlike all real ones,
implausible_more = 0.08            # and of how far this share may exceed the champion's
duplicates = 0.3                   # limit of the share of images like another generated one
copies = 0.1                       # limit of the share of images nearer to training images than any held-out one
copying = 0.8                      # limit of the chance that an image is nearer to training images than a held-out one; 0.5 is none
captions = true                    # images must match their captions, and each caption must be drawn
beat_solver = true                 # a student must draw nearer to the converged images of full than full with as many evaluations

[lines.LINE.classes.edge]          # a kind of device
configuration = "I"                # I: first convolution with stride 2 (faster); II: stride 1 (more positions)
precision = "bfloat16"             # how weights are stored: float32, float16, bfloat16 (smallest updates) or int8 (smallest file)
latency_ms = 5000                  # budget for one image, in milliseconds; the gate and every device check it
# oldest_agent = "0.1.0"           # oldest ferry-agent among the devices: bundles then have the form that it reads; the newest by default
# memory_mib = 64                  # budget for the model's memory (nano at 16 pixels needs 37 MiB); no limit by default
# variants = ["full", "dev", "fast", "turbo"]  # what devices choose from, by quality, time or energy; the first is the default
"""
