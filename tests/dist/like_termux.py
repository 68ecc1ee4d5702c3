"""Makes Debian's Python say of itself what Termux's says. As `sitecustomize` it is imported at the start."""

import ctypes  # noqa: F401  # it looks for Termux's libpython where the platform is Android
import platform
import sys
import sysconfig

sysconfig.get_config_vars()  # read from a file that is named after the platform
sys.platform = "android"
sys.getandroidapilevel = lambda: 24  # type: ignore[attr-defined]
sysconfig.get_platform = lambda: "android-24-arm64_v8a"
platform.system = lambda: "Android"
# Termux's patch: the level that it is built for, whatever the phone has.
platform.android_ver = lambda *_: platform.AndroidVer("16", 24, "", "", "", False)  # type: ignore[attr-defined]
