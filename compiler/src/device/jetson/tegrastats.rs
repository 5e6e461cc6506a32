//! A line of `tegrastats`, the program that a Jetson shows its load with.

use std::collections::BTreeMap;

use serde::Serialize;

/// Bytes of the megabytes that `tegrastats` counts in.
const MEGABYTE: u64 = 1 << 20;

/// Degrees that stand for a sensor which is off; it shows -256.
const SENSOR_OFF_BELOW: f64 = -200.0;

/// What a line says; what is not in it is empty or `None`.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TegraStats {
    /// Memory in use, of CPU and GPU together.
    pub ram_used_bytes: u64,
    /// Memory that there is.
    pub ram_total_bytes: u64,
    /// Swap in use.
    pub swap_used_bytes: Option<u64>,
    /// Load of each core, %; `None` for one that is off.
    pub cpu_percent: Vec<Option<u32>>,
    /// Load of the GPU, %.
    pub gpu_percent: Option<u32>,
    /// Clock of the GPU, MHz, if the line has it.
    pub gpu_mhz: Option<u32>,
    /// Temperatures by sensor, °C.
    pub celsius: BTreeMap<String, f64>,
    /// Rails, mW now.
    pub milliwatts: BTreeMap<String, u32>,
}

/// Reads a line such as
/// `RAM 2461/7620MB (lfb 3x2MB) … CPU [19%@729,off] … GR3D_FREQ 0%@[305] … cpu@46.5C … VDD_IN 5704mW/5704mW`; `None`
/// if it has no `RAM`. Words that are not known are passed over, since each release has others.
pub fn stats_from_line(line: &str) -> Option<TegraStats> {
    let words: Vec<&str> = line.split_whitespace().collect();
    let value = |name: &str| words.windows(2).find(|pair| pair[0] == name).map(|pair| pair[1]);
    let (ram_used_bytes, ram_total_bytes) = megabytes(value("RAM")?)?;
    let gpu = value("GR3D_FREQ").and_then(load);
    Some(TegraStats {
        ram_used_bytes,
        ram_total_bytes,
        swap_used_bytes: value("SWAP").and_then(megabytes).map(|(used, _)| used),
        cpu_percent: value("CPU").and_then(cores).unwrap_or_default(),
        gpu_percent: gpu.map(|(percent, _)| percent),
        gpu_mhz: gpu.and_then(|(_, mhz)| mhz),
        celsius: words.iter().filter_map(|word| temperature(word)).collect(),
        milliwatts: words.windows(2).filter_map(|pair| rail(pair[0], pair[1])).collect(),
    })
}

/// The last line of a log that is one of `tegrastats`.
pub fn stats_from_log(text: &str) -> Option<TegraStats> {
    text.lines().rev().find_map(stats_from_line)
}

/// `2461/7620MB` in bytes.
fn megabytes(word: &str) -> Option<(u64, u64)> {
    let (used, total) = word.strip_suffix("MB")?.split_once('/')?;
    let bytes = |text: &str| text.parse::<u64>().ok()?.checked_mul(MEGABYTE);
    Some((bytes(used)?, bytes(total)?))
}

/// `[19%@729,off]`.
fn cores(word: &str) -> Option<Vec<Option<u32>>> {
    let inner = word.strip_prefix('[')?.strip_suffix(']')?;
    let core = |text: &str| match text {
        "off" => Some(None),
        _ => Some(Some(load(text)?.0)),
    };
    inner.split(',').map(core).collect()
}

/// Load, %, and the first clock, MHz: `99%`, `36%@140` or `0%@[305,305]`.
fn load(word: &str) -> Option<(u32, Option<u32>)> {
    let (percent, rest) = word.split_once('%')?;
    let clocks = rest.strip_prefix('@').map(|clocks| clocks.trim_matches(['[', ']']));
    let mhz = clocks.and_then(|clocks| clocks.split(',').next()?.parse().ok());
    Some((percent.parse().ok().filter(|percent| *percent <= 100)?, mhz))
}

/// `cpu@46.531C`.
fn temperature(word: &str) -> Option<(String, f64)> {
    let (sensor, celsius) = word.strip_suffix('C')?.split_once('@')?;
    let celsius: f64 = celsius.parse().ok()?;
    let is_read = is_name(sensor) && celsius.is_finite() && celsius > SENSOR_OFF_BELOW;
    is_read.then(|| (sensor.to_owned(), celsius))
}

/// `VDD_IN 5704mW/5704mW`, now and on average; older releases leave out the unit.
fn rail(name: &str, word: &str) -> Option<(String, u32)> {
    let milliwatts = |text: &str| text.strip_suffix("mW").unwrap_or(text).parse::<u32>().ok();
    let (now, mean) = word.split_once('/')?;
    milliwatts(mean)?;
    let is_rail = is_name(name) && name.contains('_');
    Some((name.to_owned(), milliwatts(now)?)).filter(|_| is_rail)
}

fn is_name(text: &str) -> bool {
    (1..=32).contains(&text.len())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_')
}

#[cfg(test)]
mod tests {
    use super::*;

    const LINES: &str = include_str!("../../../tests/fixtures/jetson/tegrastats.log");

    fn line(start: &str) -> TegraStats {
        let line = LINES.lines().find(|line| line.contains(start)).unwrap();
        stats_from_line(line).unwrap()
    }

    fn rails(stats: &TegraStats) -> Vec<(&str, u32)> {
        stats.milliwatts.iter().map(|(name, milliwatts)| (name.as_str(), *milliwatts)).collect()
    }

    #[test]
    fn a_line_of_an_orin_nano_is_read() {
        let found = line("RAM 2461/7620MB");
        assert_eq!((found.ram_used_bytes, found.ram_total_bytes), (2461 << 20, 7620 << 20));
        assert_eq!(found.swap_used_bytes, Some(1243 << 20));
        assert_eq!(found.cpu_percent, [19, 14, 22, 8, 15, 17].map(Some));
        assert_eq!((found.gpu_percent, found.gpu_mhz), (Some(0), Some(305)));
        assert_eq!((found.celsius["cpu"], found.celsius["tj"]), (46.531, 48.843));
        let expected = [("VDD_CPU_GPU_CV", 831), ("VDD_IN", 5704), ("VDD_SOC", 1624)];
        assert_eq!(rails(&found), expected);
    }

    #[test]
    fn lines_of_older_boards_are_read() {
        let xavier = line("RAM 2690/6854MB");
        assert_eq!(xavier.cpu_percent, [Some(3), Some(7), Some(1), Some(0), None, None]);
        assert_eq!(xavier.gpu_mhz, Some(510));
        assert_eq!(xavier.celsius["PMIC"], 50.0);
        assert_eq!(rails(&xavier)[1], ("VDD_IN", 5079));
        let tx2 = line("RAM 1685/7854MB");
        assert_eq!((tx2.gpu_percent, tx2.gpu_mhz), (Some(36), Some(140)));
        assert_eq!(tx2.milliwatts["VDD_DDR"], 250);
        assert!(!tx2.milliwatts.contains_key("RAM"));
    }

    #[test]
    fn a_sensor_that_is_off_has_no_temperature() {
        let found = stats_from_line("RAM 1/2MB cv0@-256C gpu@40C x@nanC y@infC").unwrap();
        assert_eq!(found.celsius, [("gpu".to_owned(), 40.0)].into());
    }

    #[test]
    fn a_log_shows_its_last_line() {
        assert_eq!(stats_from_log(LINES), Some(line("RAM 1685/7854MB")));
        assert_eq!(stats_from_log("no line\nof it\n"), None);
    }

    #[test]
    fn other_lines_are_none_and_broken_words_are_passed_over() {
        for text in [
            "",
            "RAM",
            "RAM 1",
            "RAM 1/2",
            "RAM -1/2MB",
            "RAM 18446744073709551615/1MB",
            "ram 1/2MB",
        ] {
            assert_eq!(stats_from_line(text), None, "{text:?}");
        }
        let broken = "RAM 1/2MB SWAP x CPU [1%,2%@] GR3D_FREQ 101% a@C @3C VDD_IN 1mW/ VDD_SOC -1mW/1mW IRAM 0/252kB";
        let found = stats_from_line(broken).unwrap();
        let expected = TegraStats {
            ram_used_bytes: 1 << 20,
            ram_total_bytes: 2 << 20,
            cpu_percent: vec![Some(1), Some(2)],
            ..TegraStats::default()
        };
        assert_eq!(found, expected);
        for length in 0..LINES.len() {
            if let Some(start) = LINES.get(..length) {
                drop(stats_from_log(start));
            }
        }
    }
}
