"""The page on environment variables: those that the programs read, set for libraries, or ignore."""

from __future__ import annotations

from flows.settings import VARIABLES
from infra.site.text import code, joined, plain, table

READ = {
    "FERRY_WORKSPACE": ("ferry", "Folder of the workspace; the option --workspace goes first."),
    "FERRY_WEBHOOK_SECRET": (
        "ferry serve", "Secret that signs MLflow's webhooks, 24 characters or more; otherwise it is in keys/webhook.secret."
    ),
    "FERRY_ALERT_SECRET": ("ferry", "Secret that signs the alerts sent to alerts.webhook of ferry.toml, 24 characters or more."),
    **{name: ("ferry", f"Replaces {key} of [stores] in ferry.toml; use it for an address that holds a password.") for key, name in VARIABLES.items()},
    "FERRY_AGENT_DIR": ("ferry-agent", "Directory of the agent; the option --dir goes first."),
    "PREFECT_API_URL": ("ferry", "Address of a Prefect server to use; otherwise ferry starts one of its own."),
    "PREFECT_API_AUTH_STRING": (
        "ferry", "Password of that Prefect server, as name:secret; for a server of its own, ferry makes one unless it is set."
    ),
    "PREFECT_SERVER_API_AUTH_STRING": (
        "ferry", "Password that the server which ferry starts asks for; it must equal PREFECT_API_AUTH_STRING."
    ),
    "LOCAL_RANK": ("training", "Number of this process on its host, which chooses the GPU; torchrun sets it."),
    "WORLD_SIZE": ("training", "Number of processes that train together; torchrun sets it."),
}  # fmt: skip
"""Variables that the programs read themselves: name → who reads it, and what it says."""

SET = {
    "PREFECT_HOME": "Folder of Prefect's database, logs and results: work/prefect in the workspace.",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "Seconds that Prefect's server may take to start, more than Prefect's own.",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "Prefect sends no telemetry.",
    "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": "No web page may read the server's answers.",
    "PREFECT_LOGGING_LEVEL": "Prefect logs nothing to the terminal; with --debug it logs everything.",
    "PREFECT_SERVER_LOGGING_LEVEL": "Prefect's server logs errors only.",
    "DO_NOT_TRACK": "Prefect and MLflow send no telemetry.",
    "MLFLOW_DISABLE_TELEMETRY": "MLflow sends no telemetry.",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "Seconds that MLflow's client waits for an answer.",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "How often MLflow's client asks again; less than MLflow's own, so that a server that is gone is "
    "reported within minutes.",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "How the pauses between these requests grow.",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "MLflow shows no progress bars of its own.",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "MLflow prints no addresses to stdout, where --json answers.",
    "DVC_NO_ANALYTICS": "DVC sends no telemetry.",
    "ORT_DISABLE_TELEMETRY": "ONNX Runtime sends no telemetry; versions from 1.29 on do by default.",
    "GOMP_SPINCOUNT": "Threads of torch wait for each other in a way that leaves other processes room.",
    "OPENBLAS_NUM_THREADS": "Deltas, and the agent's processes that draw, use one thread.",
    "OMP_NUM_THREADS": "The agent's processes that draw use one thread.",
}
"""Variables that the programs set for libraries, mostly unless they are set already: name → what that does."""

INTERNAL = {
    "FERRY_LIFELINE", "FERRY_SERVED_BY",
    "PREFECT_SERVER_UI_ENABLED", "PREFECT__SERVER_EPHEMERAL", "PREFECT_SERVER_UI_API_URL", "PREFECT_SERVER_SERVICES_LATE_RUNS_ENABLED", "GIT_DEFAULT_HASH", "GIT_DEFAULT_REF_FORMAT",
    "GIT_CEILING_DIRECTORIES", "GIT_LITERAL_PATHSPECS", "LC_ALL",
}  # fmt: skip
"""Variables that are set for a child process only, whatever their value was; nobody can use them to change anything."""


def page() -> str:
    """Write the page."""
    return joined(
        "# Environment variables",
        "## Read by the programs {#read}",
        table(("variable", "read by", "meaning"), ((code(name), code(who), plain(said)) for name, (who, said) in READ.items())),
        "## Set by the programs {#set}",
        "The programs set these variables for the libraries that they use. A variable that you set keeps your value, with two exceptions: "
        "the processes with which an agent draws always use one thread, and `ferry --debug` sets `PREFECT_LOGGING_LEVEL`.",
        table(("variable", "effect"), ((code(name), plain(said)) for name, said in SET.items())),
        "## Read by libraries {#libraries}",
        "Libraries read their own variables, as everywhere: boto3 and DVC find credentials of S3 in `AWS_ACCESS_KEY_ID` and "
        "`AWS_SECRET_ACCESS_KEY`, MLflow's client finds the account of a server in `MLFLOW_TRACKING_USERNAME` and "
        "`MLFLOW_TRACKING_PASSWORD`, and Prefect reads all variables that begin with `PREFECT_`.",
        "ferry-agent fetches through the proxies that `http_proxy`, `https_proxy`, `all_proxy` and `no_proxy` name, in small or capital "
        "letters ([Proxies](../device.md#proxies)). Without `--ca`, OpenSSL reads the system's authorities, or those that "
        "`SSL_CERT_FILE` and `SSL_CERT_DIR` name.",
        "## Ignored {#ignored}",
        "Git's variables that lead to another repository, such as `GIT_DIR`, are removed before Git or DVC runs: hooks set them, and shells "
        "may keep them. Variables about the user, settings and servers, such as `GIT_AUTHOR_NAME` and `GIT_SSH_COMMAND`, are kept.",
    )
