"""What can go wrong between here and the Hugging Face hub, in words that help."""

from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from sdtrain.errors import InputError

_MOVED = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "runwayml/stable-diffusion-inpainting": "stable-diffusion-v1-5/stable-diffusion-inpainting",
    "lambdalabs/pokemon-blip-captions": "reach-vb/pokemon-blip-captions",
}


@contextmanager
def explained(key: str, repo: str, revision: str | None, instead: str) -> Iterator[None]:
    """Turn the hub client's errors into an `InputError` that names the params key and the way out.

    Args:
        key: the params key that named the repository, e.g. `base.repo`.
        instead: what to do where there is no network.
    """
    name = f"{key} = {repo!r}"
    try:
        yield
    except HFValidationError as error:
        raise InputError(f"{name}: not a name that the hub allows: {error}") from None
    except GatedRepoError:
        raise InputError(
            f"{name}: the repository is gated; accept its terms on its page, then log in with `hf auth login`"
        ) from None
    except RevisionNotFoundError:
        raise InputError(f"{name}: has no revision {revision!r}; see its branches and commits on its page") from None
    except RepositoryNotFoundError:
        moved = f"; it moved: use {_MOVED[repo]!r}" if repo in _MOVED else ""
        hint = moved or "; check the spelling, or log in with `hf auth login` if it is private"
        raise InputError(f"{name}: the hub has no such repository{hint}") from None
    except OfflineModeIsEnabled:
        raise InputError(f"{name}: HF_HUB_OFFLINE is set, so the hub can't be asked; unset it, or {instead}") from None
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError):
            raise InputError(_unreachable(name, instead)) from None
        raise InputError(f"{name}: {error}") from None
    except HfHubHTTPError as error:
        said = error.server_message or error.response.reason_phrase
        raise InputError(f"{name}: the hub answered {error.response.status_code}: {said}") from None
    except (HTTPError, ConnectionError) as error:
        raise InputError(f"{_unreachable(name, instead)} ({error})") from None


def _unreachable(name: str, instead: str) -> str:
    return f"{name}: can't reach the hub at {constants.ENDPOINT}; check the network, or {instead}"
