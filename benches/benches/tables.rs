//! Walking 1,000 tasks, and finding the kernel.
#![allow(missing_docs, reason = "criterion_group! makes a function without one")]

use std::hint::black_box;
use std::ops::ControlFlow;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use secmon_benches::image::{Image, TASKS};
use secmon_guest::{Cost, Guest, Request, Selection, Table};
use secmon_profile::{Cache, FindOptions};

fn rows(guest: &Guest, table: &dyn Table, request: &Request) -> usize {
    let mut rows = 0;
    let outcome = table.read(guest, request, &mut |row| {
        rows += 1;
        black_box(row);
        ControlFlow::Continue(())
    });
    outcome.expect("the table");
    rows
}

fn tables(criterion: &mut Criterion) {
    let image = Image::open().expect("the image");
    let guest = Guest::new(image.kernel.clone());
    let table = secmon_guest::table("processes").expect("the table");
    let columns = table.columns();
    let kernel_only = (0..columns.len()).filter(|index| columns[*index].cost == Cost::Kernel);
    let request = |columns: Vec<usize>| Request {
        columns: Some(columns),
        selection: Selection::default(),
    };
    let kernel_only = request(kernel_only.collect());
    let count = rows(&guest, table, &kernel_only);
    assert!(count >= TASKS, "{count} tasks");

    let mut group = criterion.benchmark_group("tables");
    group.throughput(Throughput::Elements(count as u64));
    group.bench_function("processes_kernel_columns", |bencher| {
        bencher.iter(|| rows(&guest, table, &kernel_only));
    });
    let pid = columns
        .iter()
        .position(|column| column.name == "pid")
        .expect("a column pid");
    let pid = request(vec![pid]);
    group.bench_function("processes_one_column", |bencher| {
        bencher.iter(|| rows(&guest, table, &pid));
    });
    let all = request((0..columns.len()).collect());
    group.bench_function("processes_all_columns", |bencher| {
        bencher.iter(|| rows(&guest, table, &all));
    });
    group.finish();

    let options = FindOptions {
        cache: Cache::Off,
        ..FindOptions::default()
    };
    criterion.bench_function("find_kernel", |bencher| {
        bencher.iter(|| secmon_profile::find(&image.memory, &options).expect("the kernel"));
    });
}

criterion_group!(benches, tables);
criterion_main!(benches);
