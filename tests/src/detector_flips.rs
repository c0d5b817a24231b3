//! Bits flipped where detectors look: they must end, and say what they could
//! not look at.

use std::sync::Arc;
use std::time::Instant;

use anyhow::Result;
use secmon_detect::{DetectError, Detector};
use secmon_memory::PhysicalMemory;

use crate::flips::{LINE, Longest, Random, RecordingMemory, Specimen, guest_of};

/// How many flips are made at once: what one of them leads to must not keep a
/// detector from what the others do.
const AT_ONCE: usize = 64;

/// What became of flips under detectors.
#[derive(Debug, Default)]
pub struct DetectorReport {
    /// How often a detector was run.
    pub looks: usize,
    /// How many of these found something.
    pub with_findings: usize,
    /// How many could not look to the end.
    pub incomplete: usize,
    /// The longest of them; its table is the detector.
    pub longest: Longest,
}

impl Specimen {
    /// Makes `count` flips in lines that the detectors read, many at once, and
    /// runs all detectors on each lot.
    ///
    /// # Errors
    /// If the image can't be written, or a detector can't look at the clean one.
    pub fn try_detectors(&self, seed: u64, count: usize) -> Result<DetectorReport> {
        let recorder = Arc::new(RecordingMemory::new(self.opened.memory.clone()));
        for detector in secmon_detect::detectors() {
            self.look(recorder.clone(), *detector)?;
        }
        let mut lines: Vec<u64> = recorder.take().into_iter().collect();
        lines.sort_unstable();
        let mut random = Random(seed);
        let mut report = DetectorReport::default();
        for _ in 0..count.div_ceil(AT_ONCE) {
            let flips: Vec<_> = (0..AT_ONCE)
                .map(|_| {
                    let line = lines[random.below(lines.len() as u64) as usize];
                    random.flip_in(line, LINE)
                })
                .collect();
            self.with_flips(&flips, |memory| {
                for detector in secmon_detect::detectors() {
                    let started = Instant::now();
                    let found = self.look(memory.clone(), *detector);
                    let elapsed = started.elapsed();
                    report.looks += 1;
                    match found {
                        Ok(found) => report.with_findings += usize::from(found > 0),
                        Err(_) => report.incomplete += 1,
                    }
                    if elapsed > report.longest.elapsed {
                        report.longest = Longest {
                            elapsed,
                            table: detector.name(),
                            flips: flips.clone(),
                        };
                    }
                }
            })?;
        }
        Ok(report)
    }

    fn look(
        &self,
        memory: Arc<dyn PhysicalMemory>,
        detector: &dyn Detector,
    ) -> Result<usize, DetectError> {
        let guest = guest_of(&self.opened.kernel, memory);
        let mut found = 0;
        detector.run(&guest, &mut |_| found += 1)?;
        Ok(found)
    }
}
