//! Installs what the tests need and cargo cannot give, under `target/test-deps`: a Python with the
//! ONNX checker and the ONNX Runtime shared library. What is there already is left alone.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

use crate::process;

/// The variable through which the tests find the ONNX Runtime library.
const ORT_LIB_VARIABLE: &str = "FLAMINGO_TEST_ORT_LIB";
/// The variable through which the tests find a Python with `onnx` and `numpy`.
const PYTHON_VARIABLE: &str = "FLAMINGO_TEST_PYTHON";

/// The variable through which the tests find an ONNX Runtime library with providers for GPUs.
const ORT_GPU_LIB_VARIABLE: &str = "FLAMINGO_TEST_ORT_GPU_LIB";

/// Where the things that the tests need lie.
pub(crate) struct TestDeps {
    ort_lib: PathBuf,
    /// None on machines whose wheels were not tried.
    ort_gpu_lib: Option<PathBuf>,
    python: PythonWithPackages,
}

/// A Python interpreter, and the folder of its packages where they are not its own.
struct PythonWithPackages {
    interpreter: PathBuf,
    packages: Option<PathBuf>,
}

impl TestDeps {
    /// The environment variables that the tests read.
    pub(crate) fn variables(&self) -> Vec<(&'static str, OsString)> {
        let mut variables = vec![
            (ORT_LIB_VARIABLE, self.ort_lib.clone().into_os_string()),
            (PYTHON_VARIABLE, self.python.interpreter.clone().into_os_string()),
        ];
        if let Some(library) = &self.ort_gpu_lib {
            variables.push((ORT_GPU_LIB_VARIABLE, library.clone().into_os_string()));
        }
        if let Some(packages) = &self.python.packages {
            variables.push(("PYTHONPATH", packages.clone().into_os_string()));
        }
        variables
    }

    /// Prints the variables, ready for a shell.
    pub(crate) fn announce(&self) {
        for (name, value) in self.variables() {
            process::print(&format!("export {name}='{}'\n", value.to_string_lossy()));
        }
    }
}

/// Installs what is missing and says where everything lies.
pub(crate) fn install(root: &Path) -> Result<TestDeps> {
    let deps_dir = root.join("target").join("test-deps");
    fs::create_dir_all(&deps_dir).with_context(|| format!("create `{}`", deps_dir.display()))?;
    Ok(TestDeps {
        ort_lib: install_ort_lib(root, &deps_dir, "onnxruntime", ORT_LIB_VARIABLE)?,
        ort_gpu_lib: match std::env::consts::ARCH {
            "x86_64" => {
                let name = "onnxruntime-gpu";
                Some(install_ort_lib(root, &deps_dir, name, ORT_GPU_LIB_VARIABLE)?)
            }
            _ => None,
        },
        python: install_python(root, &deps_dir)?,
    })
}

fn install_python(root: &Path, deps_dir: &Path) -> Result<PythonWithPackages> {
    if let Some(given) = std::env::var_os(PYTHON_VARIABLE) {
        return Ok(PythonWithPackages { interpreter: given.into(), packages: None });
    }
    let requirements = root.join("tests").join("requirements.txt");
    let stamp = Stamp::new(deps_dir, "python", &requirements)?;
    let venv_dir = deps_dir.join("python");
    let packages_dir = deps_dir.join("python-packages");
    let venv_python = venv_dir.join("bin").join("python");
    if !(stamp.is_current() && (venv_python.is_file() || packages_dir.is_dir())) {
        remove_dir(&venv_dir)?;
        remove_dir(&packages_dir)?;
        let mut pip = if has_venv() {
            process::run(python3().args(["-m", "venv"]).arg(&venv_dir))?;
            pip_install(&venv_python)
        } else {
            let mut pip = pip_install(Path::new("python3"));
            pip.arg("--target").arg(&packages_dir);
            pip
        };
        process::run(pip.arg("--requirement").arg(&requirements)).with_context(pip_hint)?;
        stamp.write()?;
    }
    if packages_dir.is_dir() {
        return Ok(PythonWithPackages {
            interpreter: "python3".into(),
            packages: Some(packages_dir),
        });
    }
    Ok(PythonWithPackages { interpreter: venv_python, packages: None })
}

/// Unpacks the pinned wheel beside its final place and keeps its libraries only.
fn install_ort_lib(root: &Path, deps_dir: &Path, name: &str, variable: &str) -> Result<PathBuf> {
    if let Some(given) = std::env::var_os(variable) {
        return Ok(given.into());
    }
    let requirements = root.join("xtask").join(format!("{name}.txt"));
    let stamp = Stamp::new(deps_dir, name, &requirements)?;
    let ort_dir = deps_dir.join(name);
    let ort_lib = ort_dir.join("libonnxruntime.so");
    if stamp.is_current() && ort_lib.is_file() {
        return Ok(ort_lib);
    }
    let wheel_dir = deps_dir.join(format!("{name}-wheel"));
    remove_dir(&wheel_dir)?;
    remove_dir(&ort_dir)?;
    let mut pip = pip_install(Path::new("python3"));
    pip.args(["--no-deps", "--only-binary=:all:", "--require-hashes", "--python-version", "3.12"])
        .args(["--implementation", "cp", "--platform", wheel_platform()?])
        .arg("--target")
        .arg(&wheel_dir);
    process::run(pip.arg("--requirement").arg(&requirements)).with_context(pip_hint)?;
    fs::create_dir_all(&ort_dir)?;
    keep_libraries(&wheel_dir.join("onnxruntime"), &ort_dir)?;
    remove_dir(&wheel_dir)?;
    stamp.write()?;
    Ok(ort_lib)
}

/// The wheel's platform tag for this machine.
fn wheel_platform() -> Result<&'static str> {
    match (std::env::consts::OS, std::env::consts::ARCH) {
        ("linux", "x86_64") => Ok("manylinux_2_28_x86_64"),
        ("linux", "aarch64") => Ok("manylinux_2_28_aarch64"),
        (os, arch) => bail!(
            "no pinned ONNX Runtime wheel for {os} on {arch}, expected linux on x86_64 or aarch64\n\n\
             hint: set `{ORT_LIB_VARIABLE}` to an ONNX Runtime 1.24 or newer"
        ),
    }
}

/// Moves the shared libraries and licence files out of the unpacked wheel; the versioned library
/// becomes `libonnxruntime.so`.
fn keep_libraries(package_dir: &Path, ort_dir: &Path) -> Result<()> {
    for folder in [package_dir.join("capi"), package_dir.to_path_buf()] {
        for entry in fs::read_dir(&folder).with_context(|| format!("{}", folder.display()))? {
            let path = entry?.path();
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            let kept_name = match name.as_str() {
                "LICENSE" | "ThirdPartyNotices.txt" => name.as_str(),
                library if library.starts_with("libonnxruntime.so") => "libonnxruntime.so",
                library if library.starts_with("lib") && library.ends_with(".so") => library,
                _ => continue,
            };
            fs::rename(&path, ort_dir.join(kept_name))?;
        }
    }
    if !ort_dir.join("libonnxruntime.so").is_file() {
        bail!("`{}` holds no libonnxruntime.so.*", package_dir.join("capi").display());
    }
    Ok(())
}

/// Marks an installation as done for exactly these requirements; without it the work is repeated.
struct Stamp {
    path: PathBuf,
    content: String,
}

impl Stamp {
    fn new(deps_dir: &Path, name: &str, requirements: &Path) -> Result<Self> {
        let content = fs::read_to_string(requirements)
            .with_context(|| format!("read `{}`", requirements.display()))?;
        Ok(Self { path: deps_dir.join(format!("{name}.stamp")), content })
    }

    fn is_current(&self) -> bool {
        fs::read_to_string(&self.path).is_ok_and(|found| found == self.content)
    }

    fn write(&self) -> Result<()> {
        fs::write(&self.path, &self.content)
            .with_context(|| format!("write `{}`", self.path.display()))
    }
}

fn python3() -> Command {
    Command::new("python3")
}

/// Some distributions ship Python without the parts that a virtual environment needs.
fn has_venv() -> bool {
    let mut probe = python3();
    probe.args(["-c", "import ensurepip, venv"]).stdout(Stdio::null()).stderr(Stdio::null());
    probe.status().is_ok_and(|status| status.success())
}

fn pip_install(python: &Path) -> Command {
    let mut pip = Command::new(python);
    pip.args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]);
    pip
}

fn pip_hint() -> String {
    format!(
        "could not install the tests' dependencies\n\n\
         hint: it needs `python3` 3.11 or newer with pip, and a package index; or set \
         `{ORT_LIB_VARIABLE}` and `{PYTHON_VARIABLE}`"
    )
}

fn remove_dir(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("remove `{}`", dir.display()))
        }
        _ => Ok(()),
    }
}
