//! The board: a Stellaris LM3S6965 (Cortex-M3, 256 KiB flash, 64 KiB RAM) as QEMU's `lm3s6965evb` plays it.
//!
//! The only file that names the chip, and the only one with `unsafe`. Out of it come a clock, an Ethernet
//! device for smoltcp, an LED, the identity page, a heap for RSA and the means to measure all this. No
//! interrupt handler ever runs: interrupts stay masked, and only wake the processor where it rests. That
//! keeps instruction counts deterministic and leaves no code beside the application. What exists only in
//! the simulator (random bytes from the host, the exit code) says so by name.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::Cell;
use core::mem::MaybeUninit;
use core::panic::PanicInfo;
use core::ptr::{self, addr_of};
use core::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};

use cortex_m::interrupt::InterruptNumber;
use cortex_m::peripheral::syst::SystClkSource;
use cortex_m::peripheral::{NVIC, SYST};
use cortex_m_rt::{ExceptionFrame, STACK_PAINT_VALUE, exception};
use critical_section::Mutex;
use defmt_semihosting as _;
use embedded_alloc::LlffHeap;
use firmware_example::net;
use semihosting::fs::File;
use semihosting::io::Read as _;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

/// Bytes of the heap: RSA with 2048-bit keys needs no more, and nothing else allocates.
pub(crate) const HEAP_LEN: usize = 10_752;

/// The system clock. 12.5 MHz, a quarter of what the chip can do, so that SysTick with its 24 bits takes
/// longer to come round than the second which the other half of the clock counts.
const TICKS_PER_SECOND: u32 = 12_500_000;

/// One tick in nanoseconds: how fine [`instructions`] is.
const TICK_NS: u64 = 80;

const _: () = assert!(TICKS_PER_SECOND as u64 * TICK_NS == 1_000_000_000);

/// Everything on the board, brought up.
pub(crate) struct Board {
    /// Milliseconds, and rest.
    pub(crate) clock: Clock,
    /// The Ethernet controller.
    pub(crate) ethernet: Ethernet,
    /// The one LED.
    pub(crate) led: Led,
}

impl Board {
    /// Brings the chip up. Only the first call returns the board.
    pub(crate) fn take() -> Option<Self> {
        let mut core = cortex_m::Peripherals::take()?;
        cortex_m::interrupt::disable();
        HEAP.start();

        start_system_clock();
        Clock::start(&mut core.SYST);
        Some(Self { clock: Clock(()), ethernet: Ethernet::start(), led: Led::start() })
    }
}

// --- registers -----------------------------------------------------------------------------------------------

/// A device register of this chip. Only the constants of this file make one.
#[derive(Clone, Copy)]
struct Register(usize);

impl Register {
    const fn at(base: usize, offset: usize) -> Self {
        Self(base + offset)
    }

    fn read(self) -> u32 {
        // SAFETY: every `Register` is a word-aligned device register of the LM3S6965; reading one has
        // effects on the device alone, never on memory.
        unsafe { ptr::read_volatile(self.0 as *const u32) }
    }

    fn write(self, value: u32) {
        // SAFETY: as for `read`; this chip's Ethernet controller and timers cannot write to memory.
        unsafe { ptr::write_volatile(self.0 as *mut u32, value) }
    }

    fn set(self, bits: u32) {
        self.write(self.read() | bits);
    }
}

/// The interrupts that end a rest.
#[derive(Clone, Copy)]
enum Wake {
    Timer1A = 21,
    Ethernet = 42,
}

/// The chip's part of the vector table. None of it is ever taken; it is here so that the 240 vectors that an
/// unknown chip might have are not.
#[unsafe(link_section = ".vector_table.interrupts")]
#[unsafe(no_mangle)]
static __INTERRUPTS: [unsafe extern "C" fn(); Wake::Ethernet as usize + 1] =
    [DefaultHandler; Wake::Ethernet as usize + 1];

unsafe extern "C" {
    fn DefaultHandler();
}

// SAFETY: the numbers are those of the LM3S6965's vector table, and fixed.
unsafe impl InterruptNumber for Wake {
    fn number(self) -> u16 {
        self as u16
    }
}

// --- clock ---------------------------------------------------------------------------------------------------

mod sysctl {
    use super::Register;

    const BASE: usize = 0x400F_E000;
    pub(super) const RIS: Register = Register::at(BASE, 0x050);
    pub(super) const RCC: Register = Register::at(BASE, 0x060);
    pub(super) const RCGC1: Register = Register::at(BASE, 0x104);
    pub(super) const RCGC2: Register = Register::at(BASE, 0x108);
}

/// Clocks the chip from its 8 MHz crystal: 200 MHz from the PLL, divided by 16.
fn start_system_clock() {
    const BYPASS: u32 = 1 << 11;
    const POWER_DOWN: u32 = 1 << 13;
    const USE_DIVIDER: u32 = 1 << 22;
    const DIVIDE_BY_16: u32 = 0xF << 23;
    const CRYSTAL_8_MHZ: u32 = 0xE << 6;
    const PLL_LOCKED: u32 = 1 << 6;

    sysctl::RCC.write(BYPASS | POWER_DOWN | CRYSTAL_8_MHZ | DIVIDE_BY_16);
    sysctl::RCC.write(BYPASS | CRYSTAL_8_MHZ | DIVIDE_BY_16 | USE_DIVIDER);
    while sysctl::RIS.read() & PLL_LOCKED == 0 {}
    sysctl::RCC.write(CRYSTAL_8_MHZ | DIVIDE_BY_16 | USE_DIVIDER);
}

mod timer {
    use super::Register;

    /// Timer 0 counts seconds, timer 1 ends rests.
    const BASE: [usize; 2] = [0x4003_0000, 0x4003_1000];
    pub(super) const SECONDS_CONFIG: Register = Register::at(BASE[0], 0x00);
    pub(super) const SECONDS_CONTROL: Register = Register::at(BASE[0], 0x0C);
    pub(super) const SECONDS_MATCH: Register = Register::at(BASE[0], 0x30);
    pub(super) const SECONDS: Register = Register::at(BASE[0], 0x48);
    pub(super) const REST_CONFIG: Register = Register::at(BASE[1], 0x00);
    pub(super) const REST_MODE: Register = Register::at(BASE[1], 0x04);
    pub(super) const REST_CONTROL: Register = Register::at(BASE[1], 0x0C);
    pub(super) const REST_MASK: Register = Register::at(BASE[1], 0x18);
    pub(super) const REST_CLEAR: Register = Register::at(BASE[1], 0x24);
    pub(super) const REST_LOAD: Register = Register::at(BASE[1], 0x28);
}

/// What timer 0 showed when the clock was started: a reset of the core leaves it counting.
static FIRST_SECOND: AtomicU32 = AtomicU32::new(0);

/// The latest time that was told, in ticks.
static LATEST: Mutex<Cell<u64>> = Mutex::new(Cell::new(0));

/// The time since the board was brought up.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Clock(());

impl Clock {
    fn start(syst: &mut SYST) {
        const TIMERS_0_AND_1: u32 = 0b11 << 16;
        const RTC_32_BIT: u32 = 1;

        sysctl::RCGC1.set(TIMERS_0_AND_1);
        timer::SECONDS_CONTROL.write(0);
        timer::SECONDS_CONFIG.write(RTC_32_BIT);
        timer::SECONDS_MATCH.write(u32::MAX);
        FIRST_SECOND.store(timer::SECONDS.read(), Ordering::Relaxed);

        syst.set_clock_source(SystClkSource::Core);
        syst.set_reload(SYSTICK_MASK);
        syst.clear_current();
        timer::SECONDS_CONTROL.write(1);
        syst.enable_counter();
    }
}

impl net::Clock for Clock {
    fn now(&self) -> u64 {
        now_ms()
    }

    /// Sleeps until a frame arrives or the time has come.
    fn rest(&self, until: u64) {
        const ONE_SHOT: u32 = 1;
        const TIMED_OUT: u32 = 1;

        let ticks_per_ms = TICKS_PER_SECOND / 1000;
        let ticks = (until.saturating_mul(ticks_per_ms.into())).saturating_sub(ticks());
        let mut ticks = u32::try_from(ticks).unwrap_or(u32::MAX);
        if SENT.load(Ordering::Relaxed) {
            // QEMU looks at the sockets behind its user network when some timer is due sooner than all
            // others, and would find out about this frame up to a second late.
            SENT.store(false, Ordering::Relaxed);
            ticks = ticks.min(ticks_per_ms);
        }
        if ticks == 0 {
            return;
        }

        timer::REST_CONTROL.write(0);
        timer::REST_CLEAR.write(TIMED_OUT);
        timer::REST_CONFIG.write(0);
        timer::REST_MODE.write(ONE_SHOT);
        timer::REST_LOAD.write(ticks);
        timer::REST_MASK.write(TIMED_OUT);
        ethernet::STATUS.write(ethernet::RECEIVED);
        NVIC::unpend(Wake::Timer1A);
        NVIC::unpend(Wake::Ethernet);

        // Whatever happens from here on is pending, so that `wfi` returns at once: masked interrupts wake
        // the processor all the same.
        timer::REST_CONTROL.write(1);
        if ethernet::FRAMES.read() == 0 {
            cortex_m::asm::wfi();
        }
        timer::REST_CONTROL.write(0);
    }
}

const SYSTICK_MASK: u32 = 0x00FF_FFFF;

/// Milliseconds since the board was brought up, never going back.
pub(crate) fn now_ms() -> u64 {
    ticks() / u64::from(TICKS_PER_SECOND / 1000)
}

/// Instructions executed since the board was brought up, when QEMU runs with `-icount shift=0`.
///
/// In truth it counts nanoseconds, and that option makes each instruction take one. It advances in steps
/// of 80, and by the time slept wherever the processor rested in between. Without the option it measures
/// the host's time.
pub(crate) fn instructions() -> u64 {
    ticks() * TICK_NS
}

/// Ticks of the system clock since the board was brought up.
///
/// SysTick is fine and comes round every 1.34 s; timer 0 is coarse and counts seconds by itself. Each
/// makes up for what the other lacks, so that no interrupt has to be counted and none can be missed.
fn ticks() -> u64 {
    let (seconds, fine) = loop {
        let seconds = timer::SECONDS.read();
        let fine = SYSTICK_MASK - SYST::get_current();
        if timer::SECONDS.read() == seconds {
            break (seconds, fine);
        }
    };
    let seconds = seconds.wrapping_sub(FIRST_SECOND.load(Ordering::Relaxed));

    // The one time with this SysTick value that lies nearest to the middle of this second. With a period
    // of 1.34 s it is the right one even when the second's change shows up 0.17 s late.
    let middle = u64::from(seconds) * u64::from(TICKS_PER_SECOND) + u64::from(TICKS_PER_SECOND / 2);
    let [b0, b1, b2, ..] = middle.to_le_bytes();
    let distance = fine.wrapping_sub(u32::from_le_bytes([b0, b1, b2, 0]));
    let distance = i64::from((distance << 8).cast_signed() >> 8);
    let time = middle.saturating_add_signed(distance);

    critical_section::with(|cs| {
        let latest = LATEST.borrow(cs);
        latest.set(latest.get().max(time));
        latest.get()
    })
}

// --- Ethernet ------------------------------------------------------------------------------------------------

/// The longest frame without its CRC, as every Ethernet has it. A shorter one could be told to TCP's peers,
/// but QEMU's user network does not listen and fills whatever window it sees.
const FRAME_LEN: usize = 1_514;

const HEADER_LEN: usize = 14;

mod ethernet {
    use super::Register;

    const BASE: usize = 0x4004_8000;
    /// What has happened; writing a bit acknowledges it.
    pub(super) const STATUS: Register = Register::at(BASE, 0x00);
    pub(super) const MASK: Register = Register::at(BASE, 0x04);
    pub(super) const RX_CONTROL: Register = Register::at(BASE, 0x08);
    pub(super) const TX_CONTROL: Register = Register::at(BASE, 0x0C);
    /// Both FIFOs, a word at a time. Each frame is preceded by two bytes with a length.
    pub(super) const DATA: Register = Register::at(BASE, 0x10);
    pub(super) const ADDRESS_LOW: Register = Register::at(BASE, 0x14);
    pub(super) const ADDRESS_HIGH: Register = Register::at(BASE, 0x18);
    pub(super) const THRESHOLD: Register = Register::at(BASE, 0x1C);
    pub(super) const FRAMES: Register = Register::at(BASE, 0x34);
    pub(super) const TX_REQUEST: Register = Register::at(BASE, 0x38);

    pub(super) const RECEIVED: u32 = 1 << 0;
    pub(super) const TX_ERROR: u32 = 1 << 1;
    pub(super) const ALL: u32 = 0x7F;
    pub(super) const RX_ENABLE: u32 = 1 << 0;
    pub(super) const RX_DROP_BAD_CRC: u32 = 1 << 3;
    pub(super) const RX_RESET: u32 = 1 << 4;
    pub(super) const TX_ENABLE: u32 = 1 << 0;
    pub(super) const TX_PAD: u32 = 1 << 1;
    pub(super) const TX_CRC: u32 = 1 << 2;
    pub(super) const TX_DUPLEX: u32 = 1 << 4;
    pub(super) const NO_THRESHOLD: u32 = 0x3F;
}

/// Whether a frame was sent since the last rest.
static SENT: AtomicBool = AtomicBool::new(false);

/// The Ethernet controller, as a smoltcp device.
///
/// Frames wait in the controller's FIFOs and pass through the stack of whoever handles them, where RSA
/// needs more room at other times: no memory is set aside for them.
pub(crate) struct Ethernet(());

impl Ethernet {
    fn start() -> Self {
        use ethernet::*;
        const CONTROLLER_AND_PHY: u32 = 1 << 28 | 1 << 30;

        sysctl::RCGC2.set(CONTROLLER_AND_PHY);
        // A reset of the core leaves the controller running, with the frames of the time before.
        RX_CONTROL.write(RX_RESET);
        MASK.write(0);
        STATUS.write(ALL);
        THRESHOLD.write(NO_THRESHOLD);
        TX_CONTROL.write(TX_ENABLE | TX_PAD | TX_CRC | TX_DUPLEX);
        RX_CONTROL.write(RX_ENABLE | RX_DROP_BAD_CRC);
        MASK.write(RECEIVED);

        // SAFETY: no handler exists that an interrupt could break in on; interrupts stay masked.
        unsafe {
            NVIC::unmask(Wake::Ethernet);
            NVIC::unmask(Wake::Timer1A);
        }
        Self(())
    }

    /// The address that the controller came with.
    pub(crate) fn mac(&self) -> [u8; 6] {
        let [a, b, c, d] = ethernet::ADDRESS_LOW.read().to_le_bytes();
        let [e, f, ..] = ethernet::ADDRESS_HIGH.read().to_le_bytes();
        [a, b, c, d, e, f]
    }
}

impl Device for Ethernet {
    type RxToken<'a> = Received;
    type TxToken<'a> = Room;

    fn receive(&mut self, _: Instant) -> Option<(Received, Room)> {
        (ethernet::FRAMES.read() & 0x3F != 0).then_some((Received(()), Room(())))
    }

    fn transmit(&mut self, _: Instant) -> Option<Room> {
        (ethernet::TX_REQUEST.read() & 1 == 0).then_some(Room(()))
    }

    fn capabilities(&self) -> DeviceCapabilities {
        let mut capabilities = DeviceCapabilities::default();
        capabilities.medium = Medium::Ethernet;
        capabilities.max_transmission_unit = FRAME_LEN;
        capabilities
    }
}

/// A frame in the receive FIFO; it stays there if it is not consumed.
pub(crate) struct Received(());

impl RxToken for Received {
    /// Takes the frame out of the FIFO. One that is too long or too short arrives as an empty one, which
    /// smoltcp ignores.
    #[inline(never)] // inlined, each use would add a buffer to the same stack frame
    fn consume<R, F: FnOnce(&[u8]) -> R>(self, f: F) -> R {
        const LENGTH_LEN: usize = 2;
        const CRC_LEN: usize = 4;
        const AROUND_LEN: usize = LENGTH_LEN + CRC_LEN;
        let mut buffer = [0; (AROUND_LEN + FRAME_LEN).next_multiple_of(4)];

        let first = ethernet::DATA.read().to_le_bytes();
        let [low, high, ..] = first;
        let total_len = usize::from(u16::from_le_bytes([low, high]));
        let (words, _) = buffer.as_chunks_mut::<4>();
        let mut words = words.iter_mut();
        if let Some(word) = words.next() {
            *word = first;
        }
        // Every word of the frame leaves the FIFO, also those that have no place here.
        for _ in 1..total_len.div_ceil(4) {
            let data = ethernet::DATA.read().to_le_bytes();
            if let Some(word) = words.next() {
                *word = data;
            }
        }

        let frame = match total_len.checked_sub(AROUND_LEN) {
            Some(len @ HEADER_LEN..=FRAME_LEN) => buffer.get(LENGTH_LEN..LENGTH_LEN + len),
            _ => None,
        };
        f(frame.unwrap_or_default())
    }
}

/// Room in the transmit FIFO, which holds one frame.
pub(crate) struct Room(());

impl TxToken for Room {
    #[inline(never)] // as above
    fn consume<R, F: FnOnce(&mut [u8]) -> R>(self, len: usize, f: F) -> R {
        const LENGTH_LEN: usize = 2;
        let mut buffer = [0; (LENGTH_LEN + FRAME_LEN).next_multiple_of(4)];

        // The answer to a frame has not gone through `transmit`, which looks whether the last one is out.
        while ethernet::TX_REQUEST.read() & 1 != 0 {}
        ethernet::STATUS.write(ethernet::TX_ERROR);

        // smoltcp asks for no more than the capabilities allow.
        let len = len.min(FRAME_LEN);
        let (length, frame) = buffer.split_at_mut(LENGTH_LEN);
        let result = f(frame.get_mut(..len).unwrap_or_default());

        // The controller counts what follows the Ethernet header.
        let payload_len = u16::try_from(len.saturating_sub(HEADER_LEN)).unwrap_or_default();
        length.copy_from_slice(&payload_len.to_le_bytes());
        let (words, _) = buffer.as_chunks::<4>();
        for word in words.iter().take((LENGTH_LEN + len).div_ceil(4)) {
            ethernet::DATA.write(u32::from_le_bytes(*word));
        }
        ethernet::TX_REQUEST.write(1);
        SENT.store(true, Ordering::Relaxed);
        result
    }
}

// --- LED -----------------------------------------------------------------------------------------------------

mod port_f {
    use super::Register;

    const BASE: usize = 0x4002_5000;
    /// Bits 9 to 2 of a data register's address choose the pins: this one is pin 0 alone.
    pub(super) const DATA_0: Register = Register::at(BASE, 1 << 2);
    pub(super) const DIRECTION: Register = Register::at(BASE, 0x400);
    pub(super) const DIGITAL: Register = Register::at(BASE, 0x51C);
}

/// The board's LED, on pin 0 of port F.
pub(crate) struct Led(());

impl Led {
    fn start() -> Self {
        const PORT_F: u32 = 1 << 5;
        const PIN_0: u32 = 1;

        sysctl::RCGC2.set(PORT_F);
        port_f::DIRECTION.set(PIN_0);
        port_f::DIGITAL.set(PIN_0);
        let mut led = Self(());
        led.set(false);
        led
    }

    /// Switches it.
    pub(crate) fn set(&mut self, on: bool) {
        port_f::DATA_0.write(u32::from(on));
    }

    /// Whether the pin says it is on.
    pub(crate) fn is_on(&self) -> bool {
        port_f::DATA_0.read() & 1 != 0
    }
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
    // SAFETY: memory.x sets the two symbols to the ends of a flash region that holds nothing else; flash is
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
    /// Gives the heap its arena; called once, by [`Board::take`].
    fn start(&self) {
        // SAFETY: the arena is named here and in `alloc`, which takes no more than its address; the heap is
        // its only user from now on, and `Board::take` comes here once.
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

/// Random bytes of the *host*, through semihosting. Simulation only: this chip has no source of randomness,
/// and a product on it would need one on the board.
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

defmt::timestamp!("{=u64:ms}", now_ms());

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
