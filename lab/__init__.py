"""The kexec laboratory: builds kernels, boots them under QEMU, hands over between them."""
