//! What the stub answers, understood.

use crate::hex;
use crate::protocol::Registers;

/// Why vCPUs stopped, as a stop reply says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StopReply {
    /// The signal's number: 5 (SIGTRAP) at breakpoints and after steps, 2
    /// (SIGINT) where somebody stopped the machine.
    pub signal: u8,
    /// The vCPU, from 0, if it is said.
    pub vcpu: Option<u32>,
}

impl StopReply {
    /// The signal of breakpoints and steps.
    pub const TRAP: u8 = 5;

    /// Understands `Tnn…;thread:xx;…` and `Snn`.
    pub fn parse(payload: &[u8]) -> Option<Self> {
        let (kind, rest) = payload.split_first()?;
        let (digits, rest) = rest.split_at_checked(2)?;
        let signal = *hex::decode(digits)?.first()?;
        let vcpu = match kind {
            b'S' => None,
            b'T' => rest.split(|byte| *byte == b';').find_map(|pair| {
                let thread = pair.strip_prefix(b"thread:")?;
                vcpu_of_thread(thread)
            }),
            _ => return None,
        };
        Some(Self { signal, vcpu })
    }
}

/// A thread id, which QEMU makes of the vCPU's number plus one; with the
/// multiprocess extension `pPID.TID`.
fn vcpu_of_thread(thread: &[u8]) -> Option<u32> {
    let digits = match thread.strip_prefix(b"p") {
        Some(rest) => rest.rsplit(|byte| *byte == b'.').next()?,
        None => thread,
    };
    let text = std::str::from_utf8(digits).ok()?;
    u32::from_str_radix(text, 16).ok()?.checked_sub(1)
}

/// The number of vCPUs in a list of threads (`m01,02`).
pub fn threads(payload: &[u8]) -> Option<Vec<u32>> {
    let list = payload.strip_prefix(b"m")?;
    list.split(|byte| *byte == b',')
        .map(vcpu_of_thread)
        .collect()
}

/// The registers in an answer to `g`, in the order of QEMU's
/// `gdb-xml/i386-64bit.xml`: 16 general ones, rip, eflags, six segments, three
/// bases, five control registers, efer; the rest (x87, SSE) is left out.
pub fn registers(payload: &[u8]) -> Option<Registers> {
    let bytes = hex::decode(payload)?;
    let mut reader = Reader { rest: &bytes };
    Some(Registers {
        rax: reader.u64()?,
        rbx: reader.u64()?,
        rcx: reader.u64()?,
        rdx: reader.u64()?,
        rsi: reader.u64()?,
        rdi: reader.u64()?,
        rbp: reader.u64()?,
        rsp: reader.u64()?,
        r8: reader.u64()?,
        r9: reader.u64()?,
        r10: reader.u64()?,
        r11: reader.u64()?,
        r12: reader.u64()?,
        r13: reader.u64()?,
        r14: reader.u64()?,
        r15: reader.u64()?,
        rip: reader.u64()?,
        eflags: reader.u32()?,
        cs: reader.u32()?,
        ss: reader.u32()?,
        ds: reader.u32()?,
        es: reader.u32()?,
        fs: reader.u32()?,
        gs: reader.u32()?,
        fs_base: reader.u64()?,
        gs_base: reader.u64()?,
        kernel_gs_base: reader.u64()?,
        cr0: reader.u64()?,
        cr2: reader.u64()?,
        cr3: reader.u64()?,
        cr4: reader.u64()?,
        cr8: reader.u64()?,
        efer: reader.u64()?,
    })
}

/// Little-endian integers one after the other.
struct Reader<'a> {
    rest: &'a [u8],
}

impl Reader<'_> {
    fn take<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (bytes, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*bytes)
    }

    fn u64(&mut self) -> Option<u64> {
        self.take().map(u64::from_le_bytes)
    }

    fn u32(&mut self) -> Option<u32> {
        self.take().map(u32::from_le_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn stop_replies_of_qemu() {
        let stop = |text: &str| StopReply::parse(text.as_bytes());
        let reply = |signal, vcpu| Some(StopReply { signal, vcpu });
        assert_eq!(stop("T05thread:02;"), reply(5, Some(1)));
        assert_eq!(stop("T02thread:p01.01;"), reply(2, Some(0)));
        assert_eq!(stop("T05thread:01;watch:ffff;"), reply(5, Some(0)));
        assert_eq!(stop("T05watch:ffff;thread:01;"), reply(5, None.or(Some(0))));
        assert_eq!(stop("S05"), reply(5, None));
        assert_eq!(stop("T05thread:00;"), reply(5, None));
        for nonsense in ["", "T", "T0", "OK", "Tzz", "W00"] {
            assert_eq!(stop(nonsense), None);
        }
        assert_eq!(threads(b"m01,02"), Some(vec![0, 1]));
        assert_eq!(threads(b"l"), None);
    }

    #[test]
    fn registers_lie_where_the_description_says() {
        let mut bytes = Vec::new();
        for number in 0..17_u64 {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for number in 17..24_u32 {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        for number in 24..33_u64 {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let digits = hex::encode(&bytes);
        let found = registers(digits.as_bytes()).expect("enough");
        assert_eq!((found.rax, found.r15, found.rip), (0, 15, 16));
        assert_eq!((found.eflags, found.cs, found.gs), (17, 18, 23));
        assert_eq!((found.fs_base, found.cr3, found.efer), (24, 29, 32));
        assert_eq!(registers(&digits.as_bytes()[2..]), None);
    }

    proptest! {
        #[test]
        fn any_answer_is_taken(bytes in proptest::collection::vec(any::<u8>(), 0..600)) {
            let _ = (StopReply::parse(&bytes), threads(&bytes), registers(&bytes));
        }
    }
}
