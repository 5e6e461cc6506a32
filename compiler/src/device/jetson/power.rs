//! Power: the modes of `nvpmodel`, and the rails that INA3221 chips measure.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::name_from_text;
use super::super::root::Root;

/// Most millivolts and milliamperes of a rail that are believed.
const MAX_READING: i64 = 1_000_000;

/// A power mode.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PowerMode {
    /// Its number, for `nvpmodel -m`.
    pub id: u32,
    /// Its name, such as `MAXN_SUPER`.
    pub name: Option<String>,
}

/// The power modes of a device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct PowerModes {
    /// The mode that `nvpmodel` set last.
    pub current: Option<PowerMode>,
    /// All modes of its configuration.
    pub modes: Vec<PowerMode>,
}

/// A rail, measured.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Rail {
    /// Its name, such as `VDD_IN`.
    pub name: String,
    /// Voltage, mV.
    pub millivolts: i64,
    /// Current, mA.
    pub milliamperes: i64,
    /// Their product, mW.
    pub milliwatts: i64,
}

/// The modes under a root.
pub fn modes(root: &Root) -> PowerModes {
    let names = root.text("/etc/nvpmodel.conf").map(|text| modes_from_configuration(&text));
    let names = names.unwrap_or_default();
    let status = root.text("/var/lib/nvpmodel/status");
    let mode = |id| PowerMode { id, name: names.get(&id).cloned() };
    PowerModes {
        current: status.and_then(|text| mode_from_status(&text)).map(mode),
        modes: names.keys().copied().map(mode).collect(),
    }
}

/// The number of the mode, out of `/var/lib/nvpmodel/status`: `pmode:0002 fmode:quiet`.
pub fn mode_from_status(text: &str) -> Option<u32> {
    text.split_whitespace().find_map(|word| word.strip_prefix("pmode:")?.parse().ok())
}

/// Names of modes by number, out of `/etc/nvpmodel.conf`: lines `< POWER_MODEL ID=2 NAME=MAXN_SUPER >`.
pub fn modes_from_configuration(text: &str) -> BTreeMap<u32, String> {
    let mode = |line: &str| {
        let inner = line.trim().strip_prefix('<')?.strip_suffix('>')?;
        let words = || inner.split_whitespace();
        let value = |key: &str| words().find_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        let is_mode = words().next() == Some("POWER_MODEL");
        Some((value("ID")?.parse().ok()?, name_from_text(value("NAME")?)?)).filter(|_| is_mode)
    };
    text.lines().filter_map(mode).collect()
}

/// The rails under a root: every `hwmon` whose chip is an INA3221, in the order of their numbers. JetPack 4 shows the
/// same chips elsewhere (`iio`), which is not read.
pub fn rails(root: &Root) -> Vec<Rail> {
    let folder = "/sys/class/hwmon";
    let number = |name: &String| name.trim_start_matches("hwmon").parse::<u32>().ok();
    let mut chips = root.names(folder);
    chips.sort_by_key(number);
    let rails = |chip: String| {
        let text = |file: &str| root.text(format!("{folder}/{chip}/{file}"));
        match text("name").is_some_and(|name| name.trim() == "ina3221") {
            true => rails_from_hwmon(&text),
            false => Vec::new(),
        }
    };
    chips.into_iter().flat_map(rails).collect()
}

/// The rails of a chip whose files `text` reads, as [the kernel names them]: `in1_label`, `in1_input` in mV and
/// `curr1_input` in mA. Channels that are off, without a name, or not connected (`NC`) are none.
///
/// [the kernel names them]: https://docs.kernel.org/hwmon/ina3221.html
pub fn rails_from_hwmon(text: &impl Fn(&str) -> Option<String>) -> Vec<Rail> {
    let number = |file: String| -> Option<i64> {
        let number: i64 = text(&file)?.trim().parse().ok()?;
        (-MAX_READING..=MAX_READING).contains(&number).then_some(number)
    };
    let rail = |channel: u32| {
        let name = name_from_text(&text(&format!("in{channel}_label"))?)?;
        let is_off = number(format!("in{channel}_enable")) == Some(0);
        if is_off || name == "NC" {
            return None;
        }
        let millivolts = number(format!("in{channel}_input"))?;
        let milliamperes = number(format!("curr{channel}_input"))?;
        Some(Rail { name, millivolts, milliamperes, milliwatts: millivolts * milliamperes / 1000 })
    };
    (1..=3).filter_map(rail).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_mode_is_a_number_with_a_name() {
        assert_eq!(mode_from_status("pmode:0002\n"), Some(2));
        assert_eq!(mode_from_status("fmode:quiet pmode:0000"), Some(0));
        for text in ["", "pmode:", "pmode:-1", "pmode:99999999999", "mode:2", "pmode: 2"] {
            assert_eq!(mode_from_status(text), None, "{text:?}");
        }
        let text = "# < POWER_MODEL ID=id_num NAME=mode_name >\n< PARAM TYPE=FILE NAME=CPU_ONLINE >\n\
                    CORE_0 /sys/devices/system/cpu/cpu0/online\n< POWER_MODEL ID=0 NAME=15W >\n\
                    CPU_ONLINE CORE_0 1\n< POWER_MODEL NAME=MAXN_SUPER ID=2 >\n< PM_CONFIG DEFAULT=1 >\n\
                    < POWER_MODEL ID=x NAME=y >\n< POWER_MODEL ID=7 NAME=\x1b >\n<POWER_MODEL ID=3 NAME=7W>\n";
        let expected = [(0, "15W"), (2, "MAXN_SUPER"), (3, "7W")];
        let expected = expected.map(|(id, name)| (id, name.to_owned())).into();
        assert_eq!(modes_from_configuration(text), expected);
    }

    #[test]
    fn rails_are_channels_with_name_voltage_and_current() {
        let files: BTreeMap<&str, &str> = [
            ("in1_label", "VDD_GPU_SOC\n"),
            ("in1_input", "19720\n"),
            ("curr1_input", "164\n"),
            ("in2_label", "NC\n"),
            ("in2_input", "8\n"),
            ("curr2_input", "0\n"),
            ("in3_label", "VIN_SYS_5V0\n"),
            ("in3_input", "5024\n"),
            ("curr3_input", "-8\n"),
            ("in7_label", "sum of shunt voltages\n"),
            ("in7_input", "1200\n"),
        ]
        .into();
        let read = |changed: (&str, Option<&str>)| {
            let rails = rails_from_hwmon(&|file: &str| match changed.0 == file {
                true => changed.1.map(str::to_owned),
                false => files.get(file).map(|text| (*text).to_owned()),
            });
            rails.into_iter().map(|rail| (rail.name, rail.milliwatts)).collect::<Vec<_>>()
        };
        let gpu = ("VDD_GPU_SOC".to_owned(), 3234);
        assert_eq!(read(("", None)), [gpu.clone(), ("VIN_SYS_5V0".to_owned(), -40)]);
        for changed in [
            ("in3_enable", Some("0")),
            ("in3_label", Some("")),
            ("in3_input", None),
            ("curr3_input", Some("error")),
            ("curr3_input", Some("9223372036854775807")),
        ] {
            assert_eq!(read(changed), std::slice::from_ref(&gpu), "{changed:?}");
        }
    }
}
