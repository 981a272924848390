# Cross-compiles for Apple silicon: clang, libc's and libc++'s headers are those of PyPI's ziglang.
# ZIG is its program, MACOS the oldest version that shall run the result.
set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_CXX_COMPILER "${ZIG}" c++)
set(CMAKE_CXX_COMPILER_TARGET aarch64-macos.${MACOS})
# zig expects its own libc++ beside its headers; a Mac has its system's, with less in it when older.
string(CONCAT CMAKE_CXX_FLAGS_INIT "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS "
              "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1 "
              "-fno-sized-deallocation")  # as Apple's clang
# CMake's probes: a linked program would cost a minute to build zig's libc++.
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ZIG MACOS)
set(CMAKE_PROJECT_INCLUDE "${CMAKE_CURRENT_LIST_DIR}/link.cmake")
