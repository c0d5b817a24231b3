//! Each detector once, and all of them, on a guest with 300 processes, whose
//! kernel is compared with its own file.
#![allow(missing_docs, reason = "criterion_group! makes a function without one")]

use std::hint::black_box;
use std::sync::Arc;
use std::time::Duration;

use criterion::{Criterion, criterion_group, criterion_main};
use secmon_benches::image::{self, Image};
use secmon_detect::Detector;
use secmon_guest::Guest;
use secmon_reference::KernelFile;

/// Processes in the image, at least.
const PROCESSES: usize = 300;

/// Runs detectors as `secmon check` does: with nothing known of the guest but
/// its kernel and that kernel's file, unpacked.
fn look(image: &Image, file: &Arc<KernelFile>, detectors: &[&dyn Detector]) -> usize {
    let guest = Guest::new(image.kernel.clone()).with_reference(file.clone());
    let mut findings = 0;
    for detector in detectors {
        let outcome = detector.run(&guest, &mut |finding| {
            findings += 1;
            black_box(finding);
        });
        outcome.unwrap_or_else(|error| panic!("{}: {error}", detector.name()));
    }
    findings
}

fn detectors(criterion: &mut Criterion) {
    let path = image::with_300_processes().expect("the image");
    let image = Image::open_at(&path).expect("the image");
    let guest = Guest::new(image.kernel.clone());
    let processes = secmon_guest::linux::task::leaders(&guest, "processes");
    let processes = processes.expect("the list of tasks").count();
    assert!(processes >= PROCESSES, "{processes} processes");
    let file = image::kernel_file().expect("the kernel's file");

    let mut group = criterion.benchmark_group("detectors");
    group
        .sample_size(10)
        .warm_up_time(Duration::from_millis(300))
        .measurement_time(Duration::from_secs(1));
    for detector in secmon_detect::detectors() {
        group.bench_function(detector.name(), |bencher| {
            bencher.iter(|| look(&image, &file, &[*detector]));
        });
    }
    group.bench_function("all", |bencher| {
        bencher.iter(|| look(&image, &file, secmon_detect::detectors()));
    });
    group.finish();
}

criterion_group!(benches, detectors);
criterion_main!(benches);
