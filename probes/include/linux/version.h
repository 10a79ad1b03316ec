/* SPDX-License-Identifier: MIT OR GPL-2.0-only */
/* bcc only asks whether the kernel is older than features it probes for by other means. */
#define KERNEL_VERSION(a, b, c) (((a) << 16) + ((b) << 8) + (c))
#define LINUX_VERSION_CODE KERNEL_VERSION(5, 8, 0)
