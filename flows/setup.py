"""Make a workspace (`ferry init`)."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from flows.errors import WorkspaceError
from flows.settings import SETTINGS, Settings
from flows.workspace import Workspace
from model.errors import RevisionError
from model.folder import inside, shown
from model.scorecard import LineName


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
                    f"'{shown(name)}' is no name of a line; use lower-case letters, digits and '-', 40 at most"
                ) from error
        ours = ("data", ".git", f".{SETTINGS}.tmp")
        if root.is_symlink() and not root.exists():
            raise WorkspaceError(f"{shown(root)} is a link to nowhere; name a folder")
        if root.exists() and not root.is_dir():
            raise WorkspaceError(f"{shown(root)} is a file; name a folder")
        if root.is_dir() and any(entry.name not in ours for entry in root.iterdir()):
            raise WorkspaceError(f"{shown(root)} holds other things; name an empty folder, or one with nothing but data/")
        text = settings or template([*dict.fromkeys(lines)])
        try:
            made = Settings.model_validate(tomllib.loads(text))
        except (ValidationError, tomllib.TOMLDecodeError) as error:
            raise WorkspaceError(f"the settings for {SETTINGS} are not valid: {shown(error)}") from error
        for line in made.lines.values():
            inside(root, line.data)
        root.mkdir(parents=True, exist_ok=True)
        fresh = root / f".{SETTINGS}.tmp"
        fresh.unlink(missing_ok=True)
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    workspace = Workspace(root)
    root = workspace.root
    for line in workspace.settings.lines.values():
        inside(root, line.data).mkdir(parents=True, exist_ok=True)
    ignored = root / ".gitignore"
    known = ignored.read_bytes().splitlines() if ignored.is_file() else []
    asked = [f"/{name}".encode() for name in IGNORED]
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
    "keys", "repository", "published", "dvc-remote", "ferry.db", "mlflow.db", "mlartifacts", "inbox", "work", "report.html",
    "devices", "pictures", "ratings",
)  # fmt: skip


def template(lines: list[str]) -> str:
    """Return the text of a ferry.toml for these lines, with the defaults written out and explained."""
    head = """\
# A DeltaFerry workspace. Relative paths start at this folder.
schema = 1
require_approval = false           # true: what wins waits for `ferry approve`; a line may say otherwise for itself
poll_seconds = 60                  # how often `ferry serve` looks whether an alias was moved in MLflow

[stores]
data = "dvc-remote"                # where DVC keeps the bytes of the data: a folder or s3://bucket/prefix
database = "sqlite:///ferry.db"    # ledger and fleet; postgresql://… for several machines
mlflow = "sqlite:///mlflow.db"     # or the address of an MLflow server
publish = "published"              # where devices fetch from: a folder or s3://bucket/prefix
s3_endpoint = ""                   # of an S3-compatible server other than AWS's
reports = "inbox"                  # folder in which devices leave reports

[prices]                           # yours; the report counts with them, and marks those that stay commented out as assumed
# currency = "EUR"
# megabyte = 0.5                   # of traffic to or from a device
# training_hour = 0.1              # of the machine that trains
# fleet = 1000                     # devices that an update goes to
# device = 40.0                    # what hardware that can draw costs more, each device; 0 if it is there anyway
# device_years = 5.0               # that a device serves
# images_per_day = 100.0           # that a device draws
# kilowatt_hour = 0.3              # of electricity at a device
# operator_hour = 60.0             # of the person who retrains and rolls out
# operator_hours = 2.0             # of that person for each update
# updates_per_year = 12.0
# cloud_gpu_hour = 1.0             # the same images from a cloud: of a rented accelerator,
# cloud_gpu_seconds = 0.1          # and for how long an image keeps it; or else
# cloud_thousand_images = 3.0      # of a service that sells images
# cloud_image_kilobytes = 5.0      # of traffic for an image

# [energy.LINE.CLASS.VARIANT]      # joules for an image, as `ferry-agent bench` measured them on a device
# joules = 2.1
# low = 1.9
# high = 2.3
# source = "RAPL package-0"
# quality = "measured"             # or partial or model, as bench says
"""
    return head + "".join(_line_template(name) for name in lines)


def _line_template(name: str) -> str:
    return f"""
[lines.{name}]
data = "data/{name}"               # images and a metadata.jsonl with file_name and text
tier = "nano"                      # test, nano, small or base
image_size = 16                    # pixels
channels = 1                       # 1 is grey, 3 is colour
text_length = 24                   # caption bytes

[lines.{name}.training]            # the first time, from noise
steps = 400
batch = 32
learning_rate = 2e-3

[lines.{name}.retraining]          # later, from the champion
steps = 200
batch = 32
learning_rate = 5e-4
update_grid = 2.0                  # rounds the update, so that its delta is small; 0 is off

[lines.{name}.sampler]
method = "ab2"                     # euler, heun or ab2 (second order, one evaluation a step)
steps = 14
guidance = 2.0                     # 1 is unguided

[lines.{name}.gate]
images = 256                       # generated for each evaluation
alpha = 0.05                       # chance of promoting a worse model
tolerance = 0.5                    # tolerated loss, as a share of the champion's own distance from real images,
tolerance_bands = 1.5              # or as so many distances between two sets of 25 groups of real images, if that is more
total_tolerance = 2.0              # tolerated in all against the best version ever, in such losses
minimum_images = 96                # below this, nothing is decided
coverage = 0.3
copying = 0.8                      # chance that a generated image lies nearer to training images than held-out ones do; 0.5 is none
copies = 0.1                       # share of images nearer to training images than any held-out one, to stay below
implausible = 0.3                  # share of images unlike all real ones, to stay below
implausible_more = 0.08            # by so much it may exceed the champion's, or by `tolerance` of that if that is more
duplicates = 0.3                   # share of images like another generated one, to stay below
captions = true                    # images must go with their captions, and each caption must be drawn

[lines.{name}.classes.edge]        # a kind of device
configuration = "I"                # I: stride 2, II: stride 1
precision = "bfloat16"             # how weights are stored: float32, float16, bfloat16 (smallest updates) or int8 (smallest file)
latency_ms = 5000                  # budget for one image
# memory_mib = 64                  # budget for the model's memory
"""
