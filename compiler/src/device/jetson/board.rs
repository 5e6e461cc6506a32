//! Board and processor, out of the device tree.

use serde::Serialize;

use super::super::name_from_text;

/// A Tegra processor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Soc {
    /// Its name in device trees, such as `tegra234`.
    pub name: String,
    /// Architecture of its GPU, 87 for sm_87; `None` for a processor that is not known.
    pub gpu_architecture: Option<u32>,
}

/// Architectures of GPUs by processor: `CUDA_TABLE` of `jetson_stats` (`jtop/core/jetson_variables.py`), which agrees
/// with NVIDIA's list of compute capabilities. Thor's is sm_110 since CUDA 13.0, the first in a JetPack for it; CUDA
/// 12.9 and older called it sm_101 (release notes of nvCOMPDx 0.1.1).
const GPU_ARCHITECTURES: [(&str, u32); 5] =
    [("tegra264", 110), ("tegra234", 87), ("tegra194", 72), ("tegra186", 62), ("tegra210", 53)];

/// The board's name, out of `/proc/device-tree/model`: text with a NUL at its end.
pub fn name_from_model(text: &str) -> Option<String> {
    name_from_text(text)
}

/// The processor, out of `/proc/device-tree/compatible`: names with a NUL after each, `nvidia,tegra234` among them.
pub fn soc_from_compatible(text: &str) -> Option<Soc> {
    let is_tegra = |name: &&str| {
        let number = name.strip_prefix("tegra").unwrap_or_default();
        (1..=6).contains(&number.len()) && number.bytes().all(|byte| byte.is_ascii_digit())
    };
    let mut names = text.split('\0').filter_map(|name| name.strip_prefix("nvidia,"));
    let name = names.find(is_tegra)?;
    let known = GPU_ARCHITECTURES.iter().find(|(soc, _)| *soc == name);
    Some(Soc { name: name.to_owned(), gpu_architecture: known.map(|(_, number)| *number) })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processors_are_found_among_the_compatible_names() {
        let soc = |text| soc_from_compatible(text).map(|soc| (soc.name, soc.gpu_architecture));
        let orin = "nvidia,p3768-0000+p3767-0005\0nvidia,p3767-0005\0nvidia,tegra234\0";
        assert_eq!(soc(orin), Some(("tegra234".into(), Some(87))));
        let xavier = "nvidia,p3509-0000+p3668-0001\0nvidia,tegra194\0";
        assert_eq!(soc(xavier), Some(("tegra194".into(), Some(72))));
        let thor = "nvidia,p4071-0000+p3834-0008\0nvidia,p3834-0008\0nvidia,tegra264\0";
        assert_eq!(soc(thor), Some(("tegra264".into(), Some(110))));
        assert_eq!(soc("nvidia,tegra999\0"), Some(("tegra999".into(), None)));
        for text in
            ["", "\0\0", "nvidia,tegra\0", "nvidia,tegra2\x1b\0", "brcm,bcm2712\0", "tegra234"]
        {
            assert_eq!(soc(text), None, "{text:?}");
        }
    }
}
