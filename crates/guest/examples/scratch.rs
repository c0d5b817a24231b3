#![allow(missing_docs)]
use secmon_guest::*;
use secmon_memory::*;
use secmon_profile::*;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::Instant;

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let file = std::fs::File::open(&args[1]).unwrap();
    let length = file.metadata().unwrap().len();
    let memory = MappedMemory::map_file(
        &file,
        &[(MemoryRegion::new(PhysicalAddress::new(0), length), 0)],
        Volatility::Static,
    )
    .unwrap();
    let memory: Arc<dyn PhysicalMemory> = Arc::new(memory);
    let kernel = secmon_profile::find(
        &memory,
        &FindOptions {
            cache: Cache::Off,
            ..Default::default()
        },
    )
    .unwrap();
    let guest = Guest::new(kernel);
    let table = table(&args[2]).unwrap();
    let columns = table.columns();
    let wanted: Option<Vec<usize>> = args.get(3).map(|list| {
        if list == "kernel" {
            return columns
                .iter()
                .enumerate()
                .filter(|(_, c)| c.cost == Cost::Kernel)
                .map(|(i, _)| i)
                .collect();
        }
        list.split(',')
            .map(|name| columns.iter().position(|c| c.name == name).expect(name))
            .collect()
    });
    let request = Request {
        columns: wanted.clone(),
        selection: Selection::default(),
    };
    let names: Vec<&str> = match &wanted {
        None => columns.iter().map(|c| c.name).collect(),
        Some(w) => w.iter().map(|i| columns[*i].name).collect(),
    };
    if args.get(4).is_some() {
        let mut best = f64::MAX;
        let mut rows = 0;
        for _ in 0..std::env::var("N")
            .ok()
            .and_then(|n| n.parse().ok())
            .unwrap_or(200)
        {
            let start = Instant::now();
            rows = 0;
            table
                .read(&guest, &request, &mut |row| {
                    rows += 1;
                    std::hint::black_box(&row);
                    ControlFlow::Continue(())
                })
                .unwrap();
            best = best.min(start.elapsed().as_secs_f64());
        }
        println!(
            "{rows} rows, best {:.1} us, {:.3} us a row",
            best * 1e6,
            best * 1e6 / rows as f64
        );
        return;
    }
    println!("{}", names.join("|"));
    let result = table.read(&guest, &request, &mut |row| {
        println!(
            "{}",
            row.values
                .iter()
                .map(|v| match v {
                    Value::Unreadable(r) => format!("?{r}"),
                    v => v.to_string(),
                })
                .collect::<Vec<_>>()
                .join("|")
        );
        ControlFlow::Continue(())
    });
    if let Err(e) = result {
        println!("ERROR {e}");
    }
    for d in guest.diagnostics().list() {
        println!("DIAG {d:?}");
    }
    println!("torn {}", guest.diagnostics().torn_reads());
}
