# Finds ONNX Runtime's C++ header and library; makes OnnxRuntime::OnnxRuntime.
#
# Looks at ONNXRUNTIME_INCLUDE_DIR and ONNXRUNTIME_LIBRARY, then under ONNXRUNTIME_ROOT and the usual places.
find_path(ONNXRUNTIME_INCLUDE_DIR onnxruntime_cxx_api.h
          HINTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT}
          PATH_SUFFIXES include include/onnxruntime include/onnxruntime/core/session)
find_library(ONNXRUNTIME_LIBRARY NAMES onnxruntime
             HINTS ${ONNXRUNTIME_ROOT} $ENV{ONNXRUNTIME_ROOT} PATH_SUFFIXES lib lib64)

include(FindPackageHandleStandardArgs)
find_package_handle_standard_args(OnnxRuntime REQUIRED_VARS ONNXRUNTIME_LIBRARY ONNXRUNTIME_INCLUDE_DIR)

if(OnnxRuntime_FOUND AND NOT TARGET OnnxRuntime::OnnxRuntime)
  add_library(OnnxRuntime::OnnxRuntime SHARED IMPORTED)
  set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES ${ONNXRUNTIME_INCLUDE_DIR}
    INTERFACE_SYSTEM_INCLUDE_DIRECTORIES ${ONNXRUNTIME_INCLUDE_DIR})
  if(WIN32)
    set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES IMPORTED_IMPLIB ${ONNXRUNTIME_LIBRARY})
  else()
    set_target_properties(OnnxRuntime::OnnxRuntime PROPERTIES IMPORTED_LOCATION ${ONNXRUNTIME_LIBRARY})
  endif()
endif()
