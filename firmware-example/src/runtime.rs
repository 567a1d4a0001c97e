//! What an image needs on every Cortex-M that QEMU plays, whichever the chip: the identity page, a heap for RSA, the
//! means to measure heap and stack, and an end that says where it came from.
//!
//! Beside the board it is the only file with `unsafe`. Interrupts stay masked on every board, and no handler ever runs:
//! that keeps instruction counts deterministic and leaves no code beside the application. What exists only in the
//! simulator (random bytes from the host, the exit code) says so by name.

use core::alloc::{GlobalAlloc, Layout};
use core::mem::MaybeUninit;
use core::panic::PanicInfo;
use core::ptr::{self, addr_of};
use core::sync::atomic::{AtomicUsize, Ordering};

use cortex_m_rt::{ExceptionFrame, STACK_PAINT_VALUE, exception};
use defmt_semihosting as _;
use embedded_alloc::LlffHeap;
use semihosting::fs::File;
use semihosting::io::Read as _;

use crate::board;

/// Bytes of the heap: RSA with 2048-bit keys needs no more, and nothing else allocates.
const HEAP_LEN: usize = 10_752;

/// What every board begins with: interrupts masked for good, the heap there, the core's own peripherals to have. Only
/// the first call returns them.
pub(crate) fn start() -> Option<cortex_m::Peripherals> {
    let core = cortex_m::Peripherals::take()?;
    cortex_m::interrupt::disable();
    HEAP.start();
    Some(core)
}

// --- identity page -------------------------------------------------------------------------------------------

unsafe extern "C" {
    static _identity_start: u8;
    static _identity_end: u8;
}

/// The flash page that makes this device this device. Not part of the image: QEMU loads it beside the image, and
/// where nothing was loaded it is all zeros (on a real chip, all ones).
pub(crate) fn identity_page() -> &'static [u8] {
    let start = addr_of!(_identity_start);
    let len = addr_of!(_identity_end) as usize - start as usize;
    // SAFETY: the board's linker script sets the two symbols to the ends of a region that holds nothing else; it is
    // always readable, and nobody writes to it while the image runs.
    unsafe { core::slice::from_raw_parts(start, len) }
}

// --- heap ----------------------------------------------------------------------------------------------------

#[global_allocator]
static HEAP: Heap = Heap { inner: LlffHeap::empty(), peak: AtomicUsize::new(0), reach: AtomicUsize::new(0) };

static mut ARENA: [MaybeUninit<u8>; HEAP_LEN] = [MaybeUninit::uninit(); HEAP_LEN];

/// How much of the heap was ever in use, in bytes.
#[derive(Clone, Copy, Debug, defmt::Format)]
pub(crate) struct HeapUse {
    /// The most that was allocated at one time.
    pub(crate) peak: usize,
    /// The end of the highest allocation: an arena of this size would have done.
    pub(crate) reach: usize,
}

/// How much of the heap was ever in use.
pub(crate) fn heap_high_water() -> HeapUse {
    HeapUse { peak: HEAP.peak.load(Ordering::Relaxed), reach: HEAP.reach.load(Ordering::Relaxed) }
}

/// A heap that remembers its high-water mark.
struct Heap {
    inner: LlffHeap,
    peak: AtomicUsize,
    reach: AtomicUsize,
}

impl Heap {
    /// Gives the heap its arena; called once, by [`start`].
    fn start(&self) {
        // SAFETY: the arena is named here and in `alloc`, which takes no more than its address; the heap is
        // its only user from now on, and `start` comes here once.
        unsafe { self.inner.init(&raw const ARENA as usize, HEAP_LEN) }
    }
}

// SAFETY: all memory comes from `LlffHeap`, under its contract; what is added only counts.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: the caller keeps the contract of `GlobalAlloc`, which is that of `LlffHeap`.
        let start = unsafe { self.inner.alloc(layout) };
        if !start.is_null() {
            let end = start as usize + layout.size() - &raw const ARENA as usize;
            // Nothing interrupts, so that a load and a store are as good as one step.
            self.reach.store(self.reach.load(Ordering::Relaxed).max(end), Ordering::Relaxed);
            self.peak.store(self.peak.load(Ordering::Relaxed).max(self.inner.used()), Ordering::Relaxed);
        }
        start
    }

    unsafe fn dealloc(&self, start: *mut u8, layout: Layout) {
        // SAFETY: as for `alloc`.
        unsafe { self.inner.dealloc(start, layout) }
    }
}

// --- stack ---------------------------------------------------------------------------------------------------

unsafe extern "C" {
    static __stext: u32;
    static __etext: u32;
    static _stack_end: u32;
    static _stack_start: u32;
}

/// The most bytes of stack that were ever in use. The start-up code painted all of the stack; this looks
/// how much of the paint is left.
pub(crate) fn stack_high_water() -> usize {
    let top = addr_of!(_stack_start);
    let mut word = addr_of!(_stack_end);
    // SAFETY: between the two symbols of the linker script lies the stack, word-aligned RAM that always may
    // be read. The reads are volatile, as the stack in use changes behind the compiler's back.
    while word < top && unsafe { ptr::read_volatile(word) } == STACK_PAINT_VALUE {
        word = word.wrapping_add(1);
    }
    top as usize - word as usize
}

// --- simulation only -----------------------------------------------------------------------------------------

/// Random bytes of the *host*, through semihosting. Simulation only: none of the chips has a source of randomness,
/// and a product would need one.
///
/// # Panics
///
/// When the host gives none. There is nothing to fall back to: keys that can be guessed are worse than a
/// device that does not start.
pub(crate) fn simulation_only_entropy<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    let read = File::open(c"/dev/urandom").and_then(|mut file| file.read_exact(&mut bytes));
    // All zeros is what a host that only claims to have read leaves behind.
    if read.is_err() || bytes == [0; N] {
        defmt::panic!("no entropy: the host did not let /dev/urandom be read through semihosting");
    }
    bytes
}

/// Ends the simulation with this exit code. On a chip without a debugger it would stop at a breakpoint.
pub(crate) fn exit(code: u8) -> ! {
    semihosting::process::exit(i32::from(code))
}

// --- the end -------------------------------------------------------------------------------------------------

defmt::timestamp!("{=u64:ms}", board::now_ms());

/// What QEMU exits with after a panic.
const PANICKED: u8 = 101;

/// What QEMU exits with after a fault of the processor.
const FAULTED: u8 = 102;

/// Says where it was, for `addr2line`: a file name for every place that may panic would take a quarter of
/// the image, and its size would depend on the directory it was built in. The text of a `panic!` is lost for
/// the same reason; `defmt::panic!` keeps it.
#[panic_handler]
fn panicked(_: &PanicInfo<'_>) -> ! {
    defmt::error!("panicked in calls from {:#010x}", callers());
    exit(PANICKED)
}

/// `defmt::panic!` has logged already.
#[defmt::panic_handler]
fn panicked_after_log() -> ! {
    exit(PANICKED)
}

/// Where the calls were made that the stack shows, the latest first; zeros fill the rest. What only looks
/// like an address to return to is among them.
fn callers() -> [u32; 8] {
    let code = addr_of!(__stext) as u32..addr_of!(__etext) as u32;
    let top = addr_of!(_stack_start);
    let mut word = cortex_m::register::msp::read() as *const u32;
    let mut found = [0; 8];
    for slot in &mut found {
        while word < top {
            // SAFETY: from the stack pointer up to the symbol lies the stack in use, word-aligned RAM.
            let value = unsafe { ptr::read_volatile(word) };
            word = word.wrapping_add(1);
            // A return address is odd, as all addresses of Thumb code are when they are jumped to.
            if value & 1 == 1 && code.contains(&value) {
                // Back into the call, which may have been the last instruction of its function.
                *slot = (value & !1) - 2;
                break;
            }
        }
    }
    found
}

#[exception]
unsafe fn HardFault(frame: &ExceptionFrame) -> ! {
    defmt::error!("hard fault at {=u32:#010x}, called from {=u32:#010x}", frame.pc(), frame.lr());
    exit(FAULTED)
}
