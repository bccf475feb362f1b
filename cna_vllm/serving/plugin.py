# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``vllm.general_plugins``: vLLM calls ``register`` in every process it starts.

vLLM logs and goes on when a plugin cannot be imported, but not when its call fails; so this
module imports nothing, and everything that can fail happens inside the call.
"""


def register() -> None:
    """Installs the seams; calling it again changes nothing.

    The secret of the deployment is made here, since processes that start later inherit it.
    """
    from cna_vllm.serving import seams
    from cna_vllm.serving.seal import make_secret

    make_secret()
    seams.install()
