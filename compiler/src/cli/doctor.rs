//! `flamingoc doctor`.

mod device;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use clap::Args;
use flamingo_runtime::machine::{Machine, features, instruction_sets};
use serde_json::json;

use super::Outcome;
use super::engine::EngineState;
use super::output::Output;
use crate::device::jetson::tegrastats::TegraStats;
use crate::device::jetson::{self, Jetson};
use crate::device::providers::{Provider, providers};
use crate::device::root::Root;

/// Show what this machine can run, and why not
///
/// On a Jetson also board, JetPack, CUDA and TensorRT by their files, memory, power mode and
/// rails; of ONNX Runtime's provider libraries the GPU architectures inside, and shared libraries
/// that are missing. That part was tested on copies of files, not run on hardware.
#[derive(Args)]
#[command(after_help = "Examples:
  flamingoc doctor --json
  flamingoc doctor --engines demo.flamingo
  flamingoc doctor --root copy-of-device --ort-lib copy-of-device/opt/ort")]
pub(super) struct Doctor {
    /// ONNX Runtime's shared library [default: ORT_DYLIB_PATH, then known places]
    #[arg(long, value_name = "FILE")]
    ort_lib: Option<PathBuf>,
    /// Folder with a device's files, in place of `/`: for Jetson and provider libraries
    #[arg(long, value_name = "DIR", default_value = "/", hide_default_value = true)]
    root: PathBuf,
    /// Artifact whose TensorRT engines are looked at: whether they would be used here, and if not, why
    #[arg(long, value_name = "ARTIFACT")]
    engines: Option<PathBuf>,
    /// Log of `tegrastats`, whose last line is shown
    #[arg(long, value_name = "FILE")]
    tegrastats: Option<PathBuf>,
    /// Print as JSON
    #[arg(long)]
    json: bool,
}

impl Doctor {
    pub(super) fn run(self, output: &mut Output) -> Result<Outcome> {
        let device = Device::read(&self)?;
        let machine = Machine::measure(None)?;
        let (ort, execution_providers) = ort_report(self.ort_lib.as_deref());
        let libraries = Libraries::read(&self, &device);
        let engines = match &self.engines {
            Some(artifact) => Some(EngineState::read(artifact, self.ort_lib.as_deref())?),
            None => None,
        };
        if self.json {
            let flags = |flags: Vec<(&'static str, bool)>| -> BTreeMap<&str, bool> {
                flags.into_iter().collect()
            };
            output.json(&json!({
                "cpu": machine.cpu, "isa": machine.isa,
                "isa_available": flags(instruction_sets()), "features": flags(features()),
                "threads": machine.threads,
                "read_gb_per_s": machine.read_gb_per_s, "f32_gop_per_s": machine.f32_gop_per_s,
                "bf16_gop_per_s": machine.bf16_gop_per_s,
                "int8_gop_per_s": machine.int8_gop_per_s, "onnx_runtime": ort,
                "execution_providers": execution_providers, "tract": cfg!(feature = "tract"),
                "jetson": device.jetson, "tegrastats": device.tegrastats,
                "provider_libraries": libraries.providers,
                "engines": engines,
            }))?;
            return Ok(Outcome::Ok);
        }
        show(&machine, output)?;
        device.lines().iter().try_for_each(|line| output.line(line))?;
        output.line(&format!("ONNX Runtime      {ort}"))?;
        for (name, state) in execution_providers {
            output.line(&format!("  {name:<15} {state}"))?;
        }
        libraries.lines(&device).iter().try_for_each(|line| output.line(line))?;
        if let Some(engines) = engines {
            output.line(&format!("engines           {}", engines.line()))?;
        }
        let tract =
            if cfg!(feature = "tract") { "built in" } else { "not built in (`--features tract`)" };
        output.line(&format!("tract             {tract}"))?;
        Ok(Outcome::Ok)
    }
}

/// What the files under the root say.
struct Device {
    root: Root,
    jetson: Option<Jetson>,
    tegrastats: Option<TegraStats>,
}

impl Device {
    fn read(doctor: &Doctor) -> Result<Device> {
        ensure!(doctor.root.is_dir(), "`--root {}`: expected a folder", doctor.root.display());
        let root = Root::new(&doctor.root);
        let log = doctor.tegrastats.as_deref();
        Ok(Device {
            jetson: jetson::read(&root),
            tegrastats: log.map(device::read_tegrastats).transpose()?,
            root,
        })
    }

    fn gpu_architecture(&self) -> Option<u32> {
        self.jetson.as_ref()?.soc.as_ref()?.gpu_architecture
    }

    fn lines(&self) -> Vec<String> {
        let mut lines = device::jetson_lines(self.jetson.as_ref());
        lines.extend(self.tegrastats.iter().flat_map(device::tegrastats_lines));
        lines
    }
}

/// ONNX Runtime's provider libraries, where there is a folder that may have them.
struct Libraries {
    folder: Option<PathBuf>,
    providers: Vec<Provider>,
}

impl Libraries {
    fn read(doctor: &Doctor, device: &Device) -> Libraries {
        let folder = ort_folder(doctor.ort_lib.as_deref());
        let library_path = std::env::var_os("LD_LIBRARY_PATH").filter(|_| device.root.is_own());
        let gpu = device.gpu_architecture();
        let in_folder =
            |folder: &PathBuf| providers(folder, &device.root, library_path.as_deref(), gpu);
        let providers = folder.as_ref().map(in_folder).unwrap_or_default();
        Libraries { folder, providers }
    }

    fn lines(&self, device: &Device) -> Vec<String> {
        device::provider_lines(self.folder.as_ref(), &self.providers, device.gpu_architecture())
    }
}

fn show(machine: &Machine, output: &mut Output) -> Result<()> {
    let names = |flags: Vec<(&'static str, bool)>, wanted: bool| {
        let names = flags.into_iter().filter(|(_, has)| *has == wanted).map(|(name, _)| name);
        names.collect::<Vec<_>>().join(", ")
    };
    let available = names(instruction_sets(), true);
    output.line(&format!("processor         {}", machine.cpu))?;
    output.line(&format!("instruction set   {} (available: {available})", machine.isa))?;
    output.line(&format!("features          {}", names(features(), true)))?;
    let missing = names(features(), false);
    if !missing.is_empty() {
        output.line(&format!("  not there       {missing}"))?;
    }
    output.line(&format!("threads           {}", machine.threads))?;
    output.line(&format!("read bandwidth    {:.1} GB/s, measured now", machine.read_gb_per_s))?;
    let peaks = [
        ("f32", Some(machine.f32_gop_per_s)),
        ("bf16", machine.bf16_gop_per_s),
        ("int8", machine.int8_gop_per_s),
    ];
    for (name, peak) in peaks {
        let name = format!("{name} peak");
        match peak {
            Some(peak) => output.line(&format!("{name:<17} {peak:.0} GOP/s, measured now"))?,
            None => output.line(&format!("{name:<17} no instructions for it"))?,
        }
    }
    Ok(())
}

#[cfg(feature = "ort")]
fn ort_report(library: Option<&Path>) -> (String, Vec<(&'static str, String)>) {
    flamingo_runtime::ort::report(library)
}

#[cfg(not(feature = "ort"))]
fn ort_report(_library: Option<&Path>) -> (String, Vec<(&'static str, String)>) {
    ("not built in (`--features ort`)".to_owned(), Vec::new())
}

#[cfg(feature = "ort")]
fn ort_folder(library: Option<&Path>) -> Option<PathBuf> {
    flamingo_runtime::ort::library_folder(library)
}

/// The folder that is named.
#[cfg(not(feature = "ort"))]
fn ort_folder(library: Option<&Path>) -> Option<PathBuf> {
    let library = library?;
    if library.is_dir() { Some(library.to_owned()) } else { library.parent().map(Path::to_owned) }
}
