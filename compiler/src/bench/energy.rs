//! Energy of a run, where the machine has a sensor: counters of Intel's and AMD's RAPL, or the INA3221 chips of a Jetson.
//!
//! What is measured is the whole processor, or board, with all that runs on it; nothing is subtracted for rest.

use std::time::{Duration, Instant};

use flamingo_runtime::RunError;

use super::measure::Run;
use crate::device::jetson::power::{Rail, rails};
use crate::device::root::Root;

/// How long a case is repeated: a RAPL counter moves every millisecond, an INA3221 averages over some.
const LEAST: Duration = Duration::from_millis(500);
/// Folder of RAPL's zones.
const POWERCAP: &str = "/sys/class/powercap";
/// Rails of boards without one for the whole input. `VDDQ_VDD2_1V8AO` is behind `VIN_SYS_5V0` and would count twice
/// (Jetson Linux Developer Guide, Platform Power and Performance, "Jetson AGX Orin: INA3221").
const PARTS: [&str; 3] = ["VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0"];

/// A sensor of energy or power.
#[derive(Clone, Debug)]
pub(super) struct Sensor {
    root: Root,
    kind: Kind,
}

#[derive(Clone, Debug, PartialEq)]
enum Kind {
    /// Zones of whole packages, each with the count at which it starts again, µJ.
    Rapl(Vec<(String, u64)>),
    /// Names of the rails that add up to the board.
    Rails(Vec<String>),
}

impl Sensor {
    /// The first sensor of the machine whose files lie under `root`.
    pub(super) fn find(root: &Root) -> Option<Sensor> {
        let packages = packages(root);
        let names: Vec<String> = rails(root).into_iter().map(|rail| rail.name).collect();
        let has = |name: &str| names.iter().any(|own| own == name);
        let kind = match (packages.is_empty(), has("VDD_IN")) {
            (false, _) => Kind::Rapl(packages),
            (true, true) => Kind::Rails(vec!["VDD_IN".to_owned()]),
            (true, false) => {
                Kind::Rails(PARTS.into_iter().filter(|part| has(part)).map(str::to_owned).collect())
            }
        };
        let is_there = kind != Kind::Rails(Vec::new());
        is_there.then(|| Sensor { root: root.clone(), kind })
    }

    /// What is measured.
    pub(super) fn name(&self) -> String {
        match &self.kind {
            Kind::Rapl(zones) => {
                format!("rapl: {} packages", zones.len())
            }
            Kind::Rails(names) => format!("ina3221: {}", names.join(" + ")),
        }
    }

    /// Joules of one run, over runs of half a second and more. None if the sensor falls silent.
    ///
    /// # Errors
    /// Those of the run.
    pub(super) fn joules_per_run(&self, run: &mut Run<'_>) -> Result<Option<f64>, RunError> {
        let Some(mut meter) = Meter::start(self) else { return Ok(None) };
        let (start, mut n_runs) = (Instant::now(), 0u32);
        while start.elapsed() < LEAST {
            run()?;
            n_runs += 1;
            if meter.read().is_none() {
                return Ok(None);
            }
        }
        Ok(Some(meter.joules / f64::from(n_runs)))
    }

    /// Counts of all packages, µJ, or the power of all rails, µW.
    fn values(&self) -> Option<Vec<u64>> {
        match &self.kind {
            Kind::Rapl(zones) => {
                zones.iter().map(|(zone, _)| number(&self.root, zone, "energy_uj")).collect()
            }
            Kind::Rails(names) => {
                let all = rails(&self.root);
                let of = |name: &String| all.iter().find(|rail| rail.name == *name);
                names.iter().map(|name| of(name).map(microwatts)).collect()
            }
        }
    }
}

fn microwatts(rail: &Rail) -> u64 {
    u64::try_from(rail.milliwatts).unwrap_or(0).saturating_mul(1000)
}

/// Energy since it was started.
struct Meter<'a> {
    sensor: &'a Sensor,
    at: Instant,
    values: Vec<u64>,
    joules: f64,
}

impl<'a> Meter<'a> {
    fn start(sensor: &'a Sensor) -> Option<Meter<'a>> {
        Some(Meter { sensor, at: Instant::now(), values: sensor.values()?, joules: 0.0 })
    }

    /// Adds what was used since the last reading.
    fn read(&mut self) -> Option<()> {
        let (now, values) = (Instant::now(), self.sensor.values()?);
        let seconds = now.duration_since(self.at).as_secs_f64();
        self.joules += 1e-6
            * match &self.sensor.kind {
                Kind::Rapl(zones) => {
                    let ranges = zones.iter().map(|(_, range)| *range);
                    let pairs = self.values.iter().zip(&values).zip(ranges);
                    pairs.map(|((then, now), range)| counted(*then, *now, range)).sum::<f64>()
                }
                Kind::Rails(_) => {
                    let power = |values: &[u64]| values.iter().sum::<u64>() as f64;
                    seconds * (power(&self.values) + power(&values)) / 2.0
                }
            };
        (self.at, self.values) = (now, values);
        Some(())
    }
}

/// What a counter gained that starts again after `range`.
fn counted(then: u64, now: u64, range: u64) -> f64 {
    match now >= then {
        true => (now - then) as f64,
        false => range.saturating_sub(then).saturating_add(now) as f64,
    }
}

/// Zones `…rapl:0`, whole packages, that can be read; `…rapl:0:0` are parts of one.
fn packages(root: &Root) -> Vec<(String, u64)> {
    let zone = |name: String| {
        let zone = format!("{POWERCAP}/{name}");
        let is_package = name.contains("rapl") && name.matches(':').count() == 1;
        let reads = is_package && number(root, &zone, "energy_uj").is_some();
        reads
            .then(|| number(root, &zone, "max_energy_range_uj"))
            .flatten()
            .map(|range| (zone, range))
    };
    root.names(POWERCAP).into_iter().filter_map(zone).collect()
}

fn number(root: &Root, folder: &str, file: &str) -> Option<u64> {
    root.text(format!("{folder}/{file}"))?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    fn write(root: &Path, file: &str, text: &str) {
        let path = root.join(file.trim_start_matches('/'));
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    #[test]
    fn counters_that_start_again_are_followed() {
        assert_eq!(counted(10, 25, 100), 15.0);
        assert_eq!(counted(90, 5, 100), 15.0);
    }

    /// A counter that every run moves by 3 J, over its end, too.
    #[test]
    fn a_run_takes_what_the_counter_gained() {
        let folder = tempfile::tempdir().unwrap();
        let zone = format!("{POWERCAP}/intel-rapl:0");
        write(folder.path(), &format!("{zone}/max_energy_range_uj"), "10000000\n");
        write(folder.path(), &format!("{POWERCAP}/intel-rapl:0:0/energy_uj"), "1\n");
        write(folder.path(), &format!("{POWERCAP}/intel-rapl:0:0/max_energy_range_uj"), "9\n");
        assert!(Sensor::find(&Root::new(folder.path())).is_none(), "no count that can be read");
        let energy = format!("{zone}/energy_uj");
        write(folder.path(), &energy, "9000000\n");
        let sensor = Sensor::find(&Root::new(folder.path())).unwrap();
        assert_eq!(sensor.name(), "rapl: 1 packages");
        let mut count = 9_000_000u64;
        let mut run: Run<'_> = Box::new(|| {
            count = (count + 3_000_000) % 10_000_000;
            write(folder.path(), &energy, &format!("{count}\n"));
            std::thread::sleep(Duration::from_millis(5));
            Ok(Duration::ZERO)
        });
        let joules = sensor.joules_per_run(&mut run).unwrap().unwrap();
        assert!((joules - 3.0).abs() < 1e-9, "{joules}");
        let mut silent: Run<'_> = Box::new(|| {
            fs::remove_file(folder.path().join(energy.trim_start_matches('/'))).unwrap();
            Ok(Duration::ZERO)
        });
        assert_eq!(sensor.joules_per_run(&mut silent).unwrap(), None);
    }

    /// 2 W over the time of a run.
    #[test]
    fn rails_give_power_times_time() {
        let folder = tempfile::tempdir().unwrap();
        let chip = "/sys/class/hwmon/hwmon1";
        write(folder.path(), &format!("{chip}/name"), "ina3221\n");
        for (channel, name) in [(1, "VDD_IN"), (2, "VDD_CPU_GPU_CV")] {
            write(folder.path(), &format!("{chip}/in{channel}_label"), name);
            write(folder.path(), &format!("{chip}/in{channel}_input"), "5000\n");
            write(folder.path(), &format!("{chip}/curr{channel}_input"), "400\n");
        }
        let sensor = Sensor::find(&Root::new(folder.path())).unwrap();
        assert_eq!(sensor.name(), "ina3221: VDD_IN");
        let mut run: Run<'_> = Box::new(|| {
            std::thread::sleep(Duration::from_millis(50));
            Ok(Duration::ZERO)
        });
        let joules = sensor.joules_per_run(&mut run).unwrap().unwrap();
        assert!((0.1..0.5).contains(&joules), "{joules}");
    }
}
