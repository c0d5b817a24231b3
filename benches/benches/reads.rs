//! Virtual reads of a mapped image, beside the copying of the same bytes.
#![allow(missing_docs, reason = "criterion_group! makes a function without one")]

use std::hint::black_box;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use secmon_benches::image::{Image, SPAN};

const PAGE: u64 = 4096;
/// Reads of each random measurement: more lines than any cache holds.
const SCATTERED: usize = 1 << 20;
/// Addresses given to one batched call.
const BATCH: usize = 4096;

fn reads(criterion: &mut Criterion) {
    let image = Image::open().expect("the image");
    let space = image.space();

    let mut group = criterion.benchmark_group("reads");
    let hot: Vec<_> = (0..(1 << 20) / 64)
        .map(|line| image.address(line * 64))
        .collect();
    group.throughput(Throughput::Elements(hot.len() as u64));
    group.bench_function("hot_u64", |bencher| {
        bencher.iter(|| {
            let mut sum = 0_u64;
            for address in &hot {
                sum = sum.wrapping_add(space.read_u64(*address).expect("readable"));
            }
            black_box(sum)
        });
    });

    let scattered = image.scattered(SCATTERED);
    group.sample_size(10);
    group.throughput(Throughput::Elements(SCATTERED as u64));
    group.bench_function("random_u64", |bencher| {
        bencher.iter(|| {
            let mut sum = 0_u64;
            for address in &scattered {
                sum = sum.wrapping_add(space.read_u64(*address).expect("readable"));
            }
            black_box(sum)
        });
    });
    group.bench_function("random_u64_batched", |bencher| {
        bencher.iter(|| {
            let mut sum = 0_u64;
            for batch in scattered.chunks(BATCH) {
                for value in space.read_u64_batch(batch) {
                    sum = sum.wrapping_add(value.expect("readable"));
                }
            }
            black_box(sum)
        });
    });

    let mut page = vec![0; PAGE as usize];
    group.throughput(Throughput::Elements(SPAN / PAGE));
    group.bench_function("sequential_4KiB", |bencher| {
        bencher.iter(|| {
            for number in 0..SPAN / PAGE {
                space
                    .read(image.address(number * PAGE), &mut page)
                    .expect("readable");
                black_box(&page);
            }
        });
    });
    // The physical limit of the above: the same bytes, copied from a mapping
    // of this process that nobody else writes.
    let file = std::fs::read(secmon_benches::image::path().expect("the image")).expect("the image");
    let span = &file[16 << 20..][..SPAN as usize];
    group.bench_function("sequential_4KiB_memcpy", |bencher| {
        bencher.iter(|| {
            for source in span.chunks_exact(PAGE as usize) {
                page.copy_from_slice(source);
                black_box(&page);
            }
        });
    });
    group.finish();
}

criterion_group!(benches, reads);
criterion_main!(benches);
