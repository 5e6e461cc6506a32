//! Why an execution provider cannot be had, in words that say what to do.

use super::{ExecutionProvider, NAME};
use crate::backend::BackendError;

/// The error for what ONNX Runtime says when a provider cannot be registered.
pub(super) fn unavailable(provider: ExecutionProvider, reason: &str) -> BackendError {
    let (reason, hint) = explain(provider, reason);
    let place = format!("execution provider {}", provider.name());
    BackendError::Engine { engine: NAME, place, reason, hint }
}

fn explain(provider: ExecutionProvider, reason: &str) -> (String, &'static str) {
    if reason.contains("is not enabled in this build") {
        let name = provider.name();
        return (
            format!("expected an ONNX Runtime with the provider {name}, found one without it"),
            "pass `--ort-lib` with an ONNX Runtime that has it, or `--ep cpu`",
        );
    }
    let Some((needed_by, library)) = missing_library(reason) else {
        return (reason.trim().to_owned(), "run `flamingoc doctor`, or pass `--ep cpu`");
    };
    let (what, hint) = match library {
        _ if library.starts_with("libcuda.so") => {
            ("NVIDIA's driver", "install the driver of the GPU, or pass `--ep cpu`")
        }
        _ if library.starts_with("libnvinfer") => {
            ("TensorRT", "install TensorRT of that version, or pass `--ep cuda` or `--ep cpu`")
        }
        _ => (
            "CUDA's libraries",
            "install them for this ONNX Runtime, or put their folder into LD_LIBRARY_PATH; \
             `flamingoc doctor` lists all that are missing",
        ),
    };
    (format!("expected {what}: `{library}`, which `{needed_by}` needs, found none"), hint)
}

/// The provider's file and the library that the loader did not find for it.
fn missing_library(reason: &str) -> Option<(&str, &str)> {
    let (before, after) = reason.split_once(" with error: ")?;
    let (library, rest) = after.split_once(": ")?;
    let needed_by = before.rsplit(['/', ' ']).next()?;
    let is_name = library.starts_with("lib") && !library.contains(char::is_whitespace);
    (is_name && rest.starts_with("cannot open shared object file")).then_some((needed_by, library))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What ONNX Runtime 1.31.1 says, but for the library.
    fn said(provider: &str, library: &str) -> String {
        format!(
            "/onnxruntime_src/onnxruntime/core/session/provider_bridge_ort.cc:2043 onnxruntime::Provider& \
             onnxruntime::ProviderLibrary::Get() [ONNXRuntimeError] : 1 : FAIL : Failed to load library \
             /opt/ort/libonnxruntime_providers_{provider}.so with error: {library}: cannot open shared object file: \
             No such file or directory\n"
        )
    }

    #[test]
    fn what_is_missing_is_named() {
        let (cuda, tensorrt) = (ExecutionProvider::Cuda, ExecutionProvider::TensorRt);
        let message = |provider, reason: &str| unavailable(provider, reason).to_string();
        assert_eq!(
            message(cuda, &said("cuda", "libcuda.so.1")),
            "ort: execution provider cuda: expected NVIDIA's driver: `libcuda.so.1`, which \
             `libonnxruntime_providers_cuda.so` needs, found none\n\nhint: install the driver of the GPU, or pass \
             `--ep cpu`"
        );
        assert_eq!(
            message(tensorrt, &said("tensorrt", "libnvinfer.so.10")),
            "ort: execution provider tensorrt: expected TensorRT: `libnvinfer.so.10`, which \
             `libonnxruntime_providers_tensorrt.so` needs, found none\n\nhint: install TensorRT of that version, or \
             pass `--ep cuda` or `--ep cpu`"
        );
        let other = message(cuda, "no such device\n");
        assert!(other.starts_with("ort: execution provider cuda: no such device\n\nhint: "));
    }
}
