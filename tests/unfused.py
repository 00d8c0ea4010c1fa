"""A pytest plugin: every device is one without the fused kernel, as a Mac's GPU is."""
import attention


def pytest_configure():
    attention.has_fused_kernel = lambda q: False
    attention.causal_flash = None     # so that its use would be an error
