# zig's linker takes fewer options than Apple's, and its own libc++ would be a second one in the process.
# Python's symbols come from the process that imports the module.
string(CONCAT CMAKE_CXX_CREATE_SHARED_MODULE
  "<CMAKE_CXX_COMPILER> --target=${CMAKE_CXX_COMPILER_TARGET} -shared -nostdlib++ "
  "-Wl,-undefined,dynamic_lookup -Wl,-dead_strip -Wl,-x -Wl,-S "
  "-o <TARGET> <OBJECTS> <LINK_LIBRARIES> \"${CMAKE_CURRENT_LIST_DIR}/libc++.tbd\"")
set(CMAKE_CXX_ARCHIVE_CREATE "\"${ZIG}\" ar qc <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "")
