//! The board: a Stellaris LM3S6965 (Cortex-M3, 256 KiB flash, 64 KiB RAM) as QEMU's `lm3s6965evb` plays it.
//!
//! The only file that names the chip. Out of it come a clock, an Ethernet device for smoltcp and an LED. No interrupt
//! handler ever runs: interrupts stay masked, and only wake the processor where it rests.

use core::cell::Cell;
use core::ptr;
use core::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use cortex_m::interrupt::InterruptNumber;
use cortex_m::peripheral::syst::SystClkSource;
use cortex_m::peripheral::{NVIC, SYST};
use critical_section::Mutex;
use firmware_example::net;
use smoltcp::phy::{Device, DeviceCapabilities, Medium, RxToken, TxToken};
use smoltcp::time::Instant;

use crate::runtime;

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
        let mut core = runtime::start()?;
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
