# _cuda: CUDA kernels for Python, compiled ahead of time. The CUDA runtime is static, so that importing needs no driver.
set(HM_CUDA auto CACHE STRING "build _cuda: auto (where there is an nvcc), on, off, pypi (with the nvcc of PyPI's packages)")
string(TOLOWER "${HM_CUDA}" hm_cuda)
set(hm_cuda_oldest 12.8)  # the first that knows sm_100 and sm_120

if(hm_cuda STREQUAL "off" OR APPLE)
  return()
elseif(hm_cuda STREQUAL "pypi")
  # Other packages, torch's among them, put libraries into folders of the same name.
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import nvidia.cu13 as m, os; print(next(p for p in m.__path__ if os.path.exists(p + '/bin/nvcc')))"
    OUTPUT_STRIP_TRAILING_WHITESPACE OUTPUT_VARIABLE hm_cuda_root RESULT_VARIABLE hm_failed ERROR_QUIET)
  if(hm_failed)
    message(FATAL_ERROR "HM_CUDA=pypi: ${Python_EXECUTABLE} has no nvcc; its packages are in pyproject.toml, at HM_CUDA")
  endif()
  set(CMAKE_CUDA_COMPILER "${hm_cuda_root}/bin/nvcc")
  set(ENV{LIBRARY_PATH} "${hm_cuda_root}/lib:$ENV{LIBRARY_PATH}")  # for CMake's trials: nvcc itself looks in lib64
endif()

include(CheckLanguage)
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  set(hm_architectures "$ENV{CUDAARCHS}${CMAKE_CUDA_ARCHITECTURES}")
  enable_language(CUDA)
endif()
if(NOT CMAKE_CUDA_COMPILER OR CMAKE_CUDA_COMPILER_VERSION VERSION_LESS hm_cuda_oldest)
  set(hm_why "needs nvcc ${hm_cuda_oldest} or later, found ${CMAKE_CUDA_COMPILER} ${CMAKE_CUDA_COMPILER_VERSION}")
  if(NOT hm_cuda STREQUAL "auto")
    message(FATAL_ERROR "HM_CUDA=${HM_CUDA} ${hm_why}")
  endif()
  message(STATUS "_cuda is not built: it ${hm_why}")
  return()
endif()

# For this machine's GPUs, else for all; the PTX is for GPUs to come. 90a has all of 90 and runs wherever 90 does.
if(NOT hm_architectures OR hm_architectures STREQUAL "native")
  set(CMAKE_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 100-real 120-real 90-virtual)
  if(CMAKE_CUDA_ARCHITECTURES_NATIVE MATCHES "^[0-9]+a?-real")
    string(REPLACE "90-real" "90a-real" CMAKE_CUDA_ARCHITECTURES "${CMAKE_CUDA_ARCHITECTURES_NATIVE}")
  endif()
endif()
# nvcc 13 compiles for compute_100 and later with another front end, whose code spills where compute_90's does not.
set(hm_newer "")
foreach(architecture ${CMAKE_CUDA_ARCHITECTURES})
  if(architecture MATCHES "^(1[0-9][0-9])(-real)?$")
    list(APPEND hm_newer "SHELL:--generate-code=arch=compute_90,code=sm_${CMAKE_MATCH_1}")
  endif()
endforeach()
message(STATUS "_cuda: nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${CMAKE_CUDA_ARCHITECTURES}")
string(REPLACE ";" ", " hm_architectures "${CMAKE_CUDA_ARCHITECTURES}")
list(FILTER CMAKE_CUDA_ARCHITECTURES EXCLUDE REGEX "^1[0-9][0-9](-real)?$")
if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES OFF)
endif()

file(GLOB hm_cuda_files CONFIGURE_DEPENDS "${PROJECT_SOURCE_DIR}/cuda/*.cu")
set(hm_tables "")
foreach(file ${hm_cuda_files})
  cmake_path(GET file STEM stem)
  string(APPEND hm_tables " HM_FILE(${stem})")
endforeach()
file(CONFIGURE OUTPUT cuda/cuda_files.h @ONLY CONTENT
     "#define HM_CUDA_FILES @hm_tables@\n#define HM_CUDA_ARCHITECTURES \"@hm_architectures@\"\n")

# No fast-math: results are compared with the CPU's. Spills are told, not an error: tests/packaging says where none may be.
add_library(hm_cuda OBJECT ${hm_cuda_files})
set_target_properties(hm_cuda PROPERTIES CUDA_STANDARD 17 CUDA_RUNTIME_LIBRARY Static CUDA_VISIBILITY_PRESET hidden
                      POSITION_INDEPENDENT_CODE ON)
target_compile_options(hm_cuda PRIVATE ${hm_newer} -O3 -Xfatbin -compress-all
                       "$<IF:$<BOOL:${HM_WERROR}>,-Werror=all-warnings,SHELL:-Xptxas -warn-spills>")
nanobind_add_module(_cuda NB_STATIC STABLE_ABI csrc/bind/cuda.cpp csrc/bind/cuda_device.cpp $<TARGET_OBJECTS:hm_cuda>)
find_library(hm_cudart cudart_static REQUIRED
             HINTS ${hm_cuda_root}/lib ${CMAKE_CUDA_IMPLICIT_LINK_DIRECTORIES} ${CMAKE_CUDA_HOST_IMPLICIT_LINK_DIRECTORIES})
target_include_directories(_cuda PRIVATE "${CMAKE_CURRENT_BINARY_DIR}/cuda")
target_include_directories(_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_compile_options(_cuda PRIVATE -Wall -Wextra $<$<BOOL:${HM_WERROR}>:-Werror>)
target_link_libraries(_cuda PRIVATE "${hm_cudart}" Threads::Threads ${CMAKE_DL_LIBS} rt)
set_target_properties(_cuda PROPERTIES LINKER_LANGUAGE CXX CUDA_RESOLVE_DEVICE_SYMBOLS OFF)
install(TARGETS _cuda LIBRARY DESTINATION hadamoe)
